"""Inspects a model folder's weights: the files that hold them, their fingerprint and their quantisation.

A quantised checkpoint is read as its config.json says, dequantised, or refused with the name of its quantisation;
quantisation codes are never read as weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from rankloom.config.model import Int8, Nf4, NoQuantization, Quantization
from rankloom.errors import ConfigError, ModelError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DEQUANTISED = {"fp8": "FP8", "mxfp4": "MXFP4"}
"""Quantisations that transformers dequantises while it reads, on any device: name in config.json -> name."""
CODES = {"I8", "U8", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"}
"""Safetensors' names of the types in which quantised weights are stored."""


def list_weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads: the whole one, those that the index names, else all."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def fingerprint(folder: Path) -> str:
    """Return a hash of the stored weights: every tensor's name and size, and 1024 of its values, evenly spread.

    Two models that were trained apart differ in every tensor, so samples distinguish them without reading gigabytes.
    """
    digest = hashlib.sha256()
    for name, file in sorted(list_tensors(folder).items()):
        with _translate_errors(folder), safe_open(file, framework="pt") as opened:
            values = opened.get_tensor(name).flatten()
        step = max(1, values.numel() // 1024)
        sample = values[::step][:1024].float().numpy()
        digest.update(f"{name}:{values.numel()}:".encode() + sample.tobytes())
    return f"sha256:{digest.hexdigest()}"


def list_tensors(folder: Path) -> dict[str, Path]:
    """Return every stored tensor's name and its file, from the files' headers.

    Raises:
        ModelError: a file is missing or broken, or there is none.
    """
    with _translate_errors(folder):
        files = list_weight_files(folder)
        tensors = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                tensors.update(dict.fromkeys(opened.keys(), file))
    if not files:
        raise ModelError(
            f"model.id: {folder} holds no *.safetensors; other weight formats can run code and are not read: load it "
            f"if you trust it, and save it with save_pretrained"
        )
    return tensors


@contextmanager
def _translate_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # or the index
        raise ModelError(
            f"model.id: {folder}: a weight file is missing, corrupt or truncated: {take_first_line(error)}; fetch the "
            f"model again"
        ) from error


def read_stored_quantization(shape: PretrainedConfig) -> dict[str, Any] | None:
    """Return the quantisation of the weights in config.json, if any; in a multimodal model, of its text part."""
    for part in (shape, shape.get_text_config(decoder=True)):
        config = getattr(part, "quantization_config", None)
        if config is not None:
            return config if isinstance(config, dict) else config.to_dict()
    return None


def choose_quantization(
    shape: PretrainedConfig, wanted: Quantization, compute_dtype: torch.dtype, name: str
) -> BitsAndBytesConfig | None:
    """Return how transformers must read the weights, given how they are stored and what the trial wants.

    Args:
        shape: the checkpoint's config; a quantisation in it is updated to the way in which it will be read.
        wanted: the trial's quantisation.
        compute_dtype: type of the arithmetic on 4-bit weights.
        name: the model's name, for the errors.

    Returns:
        How to quantise while reading; None: not at all.

    Raises:
        ConfigError: the checkpoint has a quantisation other than wanted.
        ModelError: the checkpoint's quantisation is not supported.
    """
    stored = read_stored_quantization(shape)
    if stored is None:
        return _make_bitsandbytes_config(wanted, compute_dtype)
    method = str(stored.get("quant_method") or "")
    if _is_bitsandbytes(stored):
        kind = "int8" if stored.get("load_in_8bit") else str(stored.get("bnb_4bit_quant_type", "fp4"))
        if kind not in ("int8", "nf4"):
            raise ModelError(
                f"model.id: {name!r} is quantised by bitsandbytes to {kind}, which is not supported; take a checkpoint "
                f"in nf4 or int8, or an unquantised one with quantization: nf4"
            )
        if wanted.type != kind:
            raise ConfigError(
                f"quantization: {name!r} is quantised already, by bitsandbytes to {kind} (given: {wanted.type}); set "
                f"quantization: {kind}, or take the unquantised model"
            )
        if kind == "nf4":
            stored["bnb_4bit_compute_dtype"] = str(compute_dtype).removeprefix("torch.")
    elif method in DEQUANTISED:
        if wanted.type != "none":
            raise ConfigError(
                f"quantization: {name!r} is stored in {DEQUANTISED[method]} and read dequantised; it can't be "
                f"quantised again while it is read (given: {wanted.type}); set quantization: none, or take the "
                f"unquantised model"
            )
        stored["dequantize"] = True
    else:
        raise ModelError(
            f"model.id: {name!r} is quantised with {method or 'an unnamed method'} (quantization_config in its "
            f"config.json), which is not supported; take the unquantised model, with quantization: nf4 or int8 if "
            f"it is too large, or a checkpoint in FP8, MXFP4 or by bitsandbytes"
        )
    shape.quantization_config = stored
    return None


def read_quantization(shape: PretrainedConfig) -> Quantization:
    """Return the setting that reads a checkpoint as stored, quantised by bitsandbytes or not."""
    stored = read_stored_quantization(shape)
    if stored is None or not _is_bitsandbytes(stored):
        return NoQuantization()
    return Int8() if stored.get("load_in_8bit") else Nf4()


def check_codes(folder: Path, shape: PretrainedConfig, name: str) -> None:
    """Check that the weight files, by their headers, agree with the quantisation in config.json.

    Raises:
        ModelError: there are codes that config.json does not mention or whose scales are missing, or it mentions a
            quantisation and there are no codes.
    """
    stored, tensors = read_stored_quantization(shape), list_tensors(folder)
    codes = _find_codes(tensors)
    if stored is None and codes:
        raise ModelError(
            f"model.id: {name!r}: {len(codes)} weight(s) are stored as codes of a quantisation, such as {codes[0]}, "
            f"but its config.json has no quantization_config; fetch config.json again, or take the unquantised model"
        )
    if stored is not None and not codes and _is_bitsandbytes(stored):
        raise ModelError(
            f"model.id: {name!r}: its config.json has a quantization_config of bitsandbytes, but none of its weights "
            f"is quantised; remove quantization_config from its config.json, or save the model again"
        )
    bare = [code for code in codes if f"{code}_scale_inv" not in tensors]
    if stored is not None and stored.get("quant_method") == "fp8" and bare:
        raise ModelError(
            f"model.id: {name!r}: {len(bare)} weight(s) in FP8 have no scales beside them, such as {bare[0]}, for "
            f"which {bare[0]}_scale_inv is missing; fetch the model again, or take the unquantised one"
        )


def check_layers(folder: Path, model: PreTrainedModel, name: str) -> None:
    """Check that config.json has all layers of the weight files: transformers would drop the upper ones.

    A block whose tensors differ from those of every lower layer is not a layer, but for example one for multi-token
    prediction.

    Raises:
        ModelError: the weight files, by their headers, have more layers.
    """
    shape = model.config.get_text_config(decoder=True)
    key = shape.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    depth, prefixes = int(getattr(shape, key, 0)), {"model", model.base_model_prefix}
    stacks = {
        _strip_prefixes(path, prefixes)
        for path, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList) and len(stack) == depth
    }
    blocks: dict[int, set[str]] = {}
    for tensor in list_tensors(folder):
        if (match := _BLOCK.fullmatch(tensor)) and _strip_prefixes(match[1], prefixes) in stacks:
            blocks.setdefault(int(match[2]), set()).add(match[3])
    kinds = [inner for number, inner in blocks.items() if number < depth]
    if surplus := [number for number, inner in blocks.items() if number >= depth and inner in kinds]:
        raise ModelError(
            f"model.id: {name!r}: {folder / 'config.json'} has {key}={depth}, but the weights beside it hold "
            f"{max(surplus) + 1} layers, and the upper ones would be left out; set {key}={max(surplus) + 1}, or save "
            f"the smaller model with save_pretrained"
        )


_BLOCK = re.compile(r"([^0-9]*)\.([0-9]+)\.(.+)")


def _strip_prefixes(path: str, prefixes: set[str]) -> str:
    """Return a module's path without the prefixes that checkpoints of the bare model lack."""
    return ".".join(part for part in path.split(".") if part not in prefixes)


def _is_bitsandbytes(stored: Mapping[str, Any]) -> bool:
    method = str(stored.get("quant_method") or "")
    return bool(stored.get("load_in_8bit") or stored.get("load_in_4bit") or method.startswith("bitsandbytes"))


def _make_bitsandbytes_config(wanted: Quantization, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if isinstance(wanted, Int8):
        return BitsAndBytesConfig(load_in_8bit=True)
    if isinstance(wanted, Nf4):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=wanted.double,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return None


def forget_quantization(model: PreTrainedModel) -> None:
    """Turn a dequantised model into a plain one; otherwise PEFT and save_pretrained treat its layers as quantised."""
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        setattr(model, name, False)
    model.hf_quantizer = None
    for part in (model.config, model.config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    # otherwise save_pretrained would reverse the conversion of the codes; now it saves as for a model made from scratch
    model._weight_conversions = None


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert a model's weights to a type, except those that transformers keeps in fp32 (DeepSeek-V3's router bias)."""
    kept = re.compile("|".join(model._keep_in_fp32_modules_strict or ()) or "(?!)")
    for name, weight in model.named_parameters():
        if not kept.search(name):
            weight.data = weight.data.to(dtype)


def check_loaded(model: PreTrainedModel, loading: dict[str, Any], name: str) -> None:
    """Check that a checkpoint's tensors match config.json.

    Args:
        loading: the loading info of `from_pretrained`.

    Raises:
        ModelError: tensors are missing or of another shape, or a layer has tensors that the model does not use.
    """
    # transformers would initialise missing tensors at random and only log it
    absent = sorted(
        {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"]), *_find_misshapen(model)}
    )
    surplus = sorted(_find_surplus(model, loading["unexpected_keys"]))
    if absent:
        raise ModelError(
            f"model.id: {name!r}: {len(absent)} tensor(s) that its config.json asks for are missing from its "
            f"weight files or have another shape, such as {absent[0]}; fetch or save the model again, whole"
        )
    if surplus:
        raise ModelError(
            f"model.id: {name!r}: its weight files hold {len(surplus)} tensor(s) of layers that, by its config.json, "
            f"have none, such as {surplus[0]}: without them it would not be the model that was saved; is config.json "
            f"another model's, or does it lack a quantization_config?"
        )


def _find_misshapen(model: PreTrainedModel) -> set[str]:
    """Return the names of quantised weights that transformers accepted in another shape than their layer's."""
    if not getattr(model, "is_quantized", False):
        return set()
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # slow to import, and most bases are plain

    misshapen = set()
    for name, module in model.named_modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            state = getattr(module.weight, "quant_state", None)
            shape = module.weight.shape if state is None else state.shape
            if tuple(shape) != (module.out_features, module.in_features):
                misshapen.add(f"{name}.weight")
    return misshapen


def _find_codes(tensors: Mapping[str, Path]) -> list[str]:
    """Return the stored matrices that have a type of quantised weights, without biases.

    Old checkpoints keep attention masks (`attn.bias`) as bytes.
    """
    codes = []
    for file in sorted(set(tensors.values())):
        with safe_open(file, framework="pt") as opened:
            for name in list(opened.keys()):
                tensor = opened.get_slice(name)
                if tensor.get_dtype() in CODES and len(tensor.get_shape()) > 1 and not name.endswith("bias"):
                    codes.append(name)
    return codes


def _find_surplus(model: PreTrainedModel, unexpected: set[str]) -> set[str]:
    """Return the unexpected tensors that belong to a layer of the model, or are weights inside one of its blocks.

    Others are parts that a causal language model leaves out: a vision tower, a classifier's head, blocks for
    multi-token prediction. Old checkpoints also keep masks as buffers in their blocks, under the name bias.
    """
    modules = dict(model.named_modules())
    blocks = {f"{name}.{i}" for name, m in modules.items() if isinstance(m, nn.ModuleList) for i in range(len(m))}
    layers = {name for name, module in modules.items() if _is_layer(module)}
    prefix = f"{model.base_model_prefix}."
    surplus = set()
    for key in unexpected:
        parts = key.split(".")
        owners = {".".join(parts[:i]) for i in range(1, len(parts))}
        owners |= {f"{prefix}{owner}" for owner in owners}  # checkpoints of the bare model lack it
        if owners & layers or (owners & blocks and parts[-1] == "weight"):
            surplus.add(key)
    return surplus


def _is_layer(module: nn.Module) -> bool:
    """Return whether a module has weights and no children: a linear layer, an embedding, a norm."""
    return not any(True for _ in module.children()) and any(True for _ in module.parameters(recurse=False))


def take_first_line(error: BaseException) -> str:
    """Return an error's first line, joined with the second if it ends with a colon."""
    if isinstance(error, KeyError):
        return f"{error} is unknown or missing"
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join([first.strip(), *(line.strip() for line in rest[:1] if first.rstrip().endswith(":"))])
