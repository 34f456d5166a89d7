"""Loads a hub id, a folder, a GGUF file or `builtin:smollm2` as a frozen `Base`.

Weights are read only from safetensors; a GGUF file is converted once into the cache. The fingerprint comes from the
stored weights, so that it does not depend on the type or the quantisation in which they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rankloom import kernels
from rankloom.config.model import Dtype, Int8, ModelConfig, Nf4, NoQuantization, Quantization
from rankloom.errors import ModelError
from rankloom.models.checkpoints import (
    INDEX,
    WHOLE,
    cast_weights,
    check_codes,
    check_layers,
    check_loaded,
    choose_quantization,
    fingerprint,
    forget_quantization,
    list_weight_files,
    read_quantization,
    read_stored_quantization,
    take_first_line,
)
from rankloom.models.folder import is_on_hub, locate_folder
from rankloom.models.onednn import use_onednn
from rankloom.models.quantized import replace_int8_forwards

OTHER_TASKS = ("Classification", "QuestionAnswering", "MultipleChoice", "RewardModel")
"""Ends of the names of architectures with a head other than a language model's."""
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        """Token id for padding."""
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
        dtype: type of the weights if `config.dtype` is auto; None: `choose_auto_dtype`.
        compute_dtype: type of the arithmetic on NF4 weights if the quantisation's own is auto; None: as for `dtype`.

    Raises:
        ModelError: the model is missing, unreadable, without safetensors, or not a causal language model.
        ConfigError: the checkpoint has a quantisation other than wanted.
    """
    folder = locate_folder(config)
    mark = fingerprint(folder)  # first, because its errors name a broken weight file
    stored = resolve_dtype(config.dtype, dtype or choose_auto_dtype(device))
    compute_dtype = compute_dtype or choose_auto_dtype(device)
    if isinstance(quantization, Nf4):
        compute_dtype = resolve_dtype(quantization.compute_dtype, compute_dtype)
    model = _read_model(folder, config.id, quantization, device, stored, compute_dtype)
    model.requires_grad_(False).eval()
    use_onednn(model)
    if kernels.use_on(device):
        from rankloom.models.fused import fuse  # only GPUs need it, and it imports Llama's code

        fuse(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # on a CPU with AVX512-BF16 the first forward in eval mode would repack NF4 weights permanently: coarser
            # (bf16 constants and arithmetic), and without a gradient to the input, so that training would break
            module.support_avx512bf16_for_cpu = False
    if isinstance(quantization, Int8):
        replace_int8_forwards(model)
    if _sees_ahead(model):
        raise _make_not_causal_error(config.id, type(model).__name__)
    return _make_base(config, folder, mark, model, quantization.type, device)


def _make_base(
    config: ModelConfig, folder: Path, mark: str, model: PreTrainedModel, quantization: str, device: torch.device
) -> Base:
    return Base(
        model=model,
        tokenizer=_read_tokenizer(folder, config.id),
        id=config.id,
        folder=folder,
        fingerprint=mark,
        quantization=quantization,
        device=device,
    )


def detect_quantization(config: ModelConfig) -> Quantization:
    """Return the setting that reads a base as stored, quantised by bitsandbytes or not."""
    return read_quantization(_read_shape(locate_folder(config, weights=False), config.id))


def reload_weights(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load an unquantised base's model again, on the CPU, with its weights before training."""
    return _read_model(folder, str(folder), NoQuantization(), torch.device("cpu"), dtype, dtype)


def _read_model(
    folder: Path,
    name: str,
    quantization: Quantization,
    device: torch.device,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> PreTrainedModel:
    if device.type == "cuda":  # cuDNN's attention plans each new shape for 0.1 to 2 s; most steps have one
        torch.backends.cuda.enable_cudnn_sdp(False)
    shape = _read_shape(folder, name)
    plain = read_stored_quantization(shape) is None
    reading = choose_quantization(shape, quantization, compute_dtype, name)
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
            ignore_mismatched_sizes=True,  # `check_loaded` refuses them by name
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, SafetensorError) as error:
        raise _load_error(shape, name, error) from error
    check_loaded(model, loading, name)
    check_layers(folder, model, name)
    _check_causal(model, name)
    if quantization.type == "none" and not plain:
        forget_quantization(model)
        cast_weights(model, dtype)  # some have their scales' type, some the stored one
    return model


def _read_shape(folder: Path, name: str) -> PretrainedConfig:
    """Return a model's config without dropout: in a host all members would share its noise; alone it must be equal."""
    try:
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a wrong value can raise anything
        raise ModelError(f"model.id: {name!r}: its config.json can't be read: {take_first_line(error)}") from error
    parts = [shape]
    for part in parts:
        parts += [value for value in vars(part).values() if isinstance(value, PretrainedConfig)]
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):  # attn_pdrop, hidden_dropout_prob, layerdrop
                setattr(part, key, 0.0)
    return shape


def load_outline(config: ModelConfig, *, dtype: torch.dtype) -> Base:
    """Load a base without its weights, on the meta device, to inspect names, shapes and tokens.

    Args:
        dtype: type of the weights if `config.dtype` is auto.

    Raises:
        ModelError: the model is missing, unreadable or without safetensors.
    """
    folder = locate_folder(config)
    mark = fingerprint(folder)
    model = _build_on_meta(folder, config.id, _read_shape(folder, config.id), resolve_dtype(config.dtype, dtype))
    check_layers(folder, model, config.id)
    return _make_base(config, folder, mark, model, "none", torch.device("meta"))


def load_shell(config: ModelConfig, quantization: Quantization, *, config_alone: bool = False) -> PreTrainedModel:
    """Load only the model, without weights, on the meta device, with the checks of `load_base` that read config.json.

    Args:
        config_alone: whether a folder without weight files will do.

    Raises:
        ModelError: the model is missing, unreadable or not a causal language model.
        ConfigError: the checkpoint has a quantisation other than wanted.
    """
    folder = locate_folder(config, weights=False)
    shape = _read_shape(folder, config.id)
    choose_quantization(shape, quantization, torch.float32, config.id)
    if is_on_hub(config) or config_alone:
        return _build_on_meta(folder, config.id, shape, torch.float32)
    check_codes(folder, shape, config.id)
    names = [file.name for file in list_weight_files(folder)]
    if WHOLE not in names and not (folder / INDEX).is_file():
        raise ModelError(
            f"model.id: {config.id!r} holds {', '.join(names)}, but neither {WHOLE} nor {INDEX}, one of which is read; "
            f"fetch the index, or rename the file if it is the whole model"
        )
    model = _build_on_meta(folder, config.id, shape, torch.float32)
    check_layers(folder, model, config.id)
    return model


def _build_on_meta(folder: Path, name: str, shape: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    _check_kind(shape, name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _load_error(shape, name, error) from error
    _check_causal(model, name)
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen


def _check_kind(shape: PretrainedConfig, name: str) -> None:
    """Raise ModelError if config.json describes another kind of model: a part of it would load, but be meaningless."""
    saved_as = next(iter(shape.architectures or ()), shape.model_type)
    if saved_as.endswith(OTHER_TASKS):
        raise ModelError(
            f"model.id: {name!r} ({saved_as}) is not a language model, but was trained for another task; take the "
            f"model that it was made from"
        )
    if getattr(shape, "is_encoder_decoder", False):
        raise ModelError(
            f"model.id: {name!r} ({saved_as}) is an encoder and a decoder, and only decoders can be tuned; "
            f"take a causal language model"
        )
    if getattr(shape, "attn_type", None) == "bi" or getattr(shape, "causal", None) is False:  # XLNet; XLM
        raise _make_not_causal_error(name, saved_as)


def _load_error(shape: PretrainedConfig, name: str, error: Exception) -> ModelError:
    if "Unrecognized configuration class" in str(error):
        return ModelError(
            f"model.id: {name!r} is of the type {shape.model_type}, for which transformers has no causal "
            f"language model; take a decoder, such as one of Llama's or Qwen's architecture"
        )
    return ModelError(f"model.id: {name!r} can't be loaded: {take_first_line(error)}")


def _make_not_causal_error(name: str, kind: str) -> ModelError:
    return ModelError(
        f"model.id: {name!r} ({kind}) is not a causal language model: each token sees those after it, so that it can't "
        f"be tuned to generate; take a decoder, or set is_decoder in its config.json if it was trained as one"
    )


def _check_causal(model: PreTrainedModel, name: str) -> None:
    """Raise ModelError for an encoder, which sees the tokens that it must predict: its config has is_decoder=false."""
    said = {getattr(m, key) for m in model.modules() for key in ("is_causal", "is_decoder") if hasattr(m, key)}
    if getattr(model.config, "is_decoder", None) is False and False in said and True not in said:
        raise _make_not_causal_error(name, type(model).__name__)


@torch.no_grad()
def _sees_ahead(model: PreTrainedModel) -> bool:
    """Return whether the logits after the first token depend on the second, whatever the config says."""
    device = model.get_input_embeddings().weight.device
    try:
        logits_2TV = model(input_ids=torch.tensor([[1, 2], [1, 3]], device=device), use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
        return False  # a model that takes other inputs
    noise = 1e-4 if logits_2TV.dtype == torch.float32 else 0.02
    one, other = logits_2TV[:, 0].float()
    return bool((one - other).abs().max() > noise * one.abs().max())


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load only the model's tokenizer; it always has a pad token.

    Raises:
        ModelError: the tokenizer is missing, unreadable, or has no end-of-sequence token.
    """
    return _read_tokenizer(locate_folder(config, weights=False), config.id)


def choose_auto_dtype(device: torch.device) -> torch.dtype:
    """Return the type that `auto` means for weights and arithmetic, in training, scoring and serving alike."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def resolve_dtype(wanted: Dtype, auto: torch.dtype) -> torch.dtype:
    """Return the torch type of a setting; `auto` stands for the given default."""
    return auto if wanted == "auto" else DTYPES[wanted]


def _read_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # broken files make the tokenizers library and transformers raise anything
        _check_sentencepiece(folder, name)
        raise ModelError(f"model.id: {name!r} has no usable tokenizer: {take_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.id: {name!r}'s tokenizer has no end-of-sequence token, which ends every completion")
    rows = getattr(_read_shape(folder, name).get_text_config(decoder=True), "vocab_size", None) or len(tokenizer)
    if tokenizer.eos_token_id >= rows:
        raise ModelError(
            f"model.id: {name!r}'s end-of-sequence token {tokenizer.eos_token!r} has id {tokenizer.eos_token_id}, but "
            f"the model embeds only {rows} tokens; take the tokenizer that belongs to it, or resize its embedding "
            f"(resize_token_embeddings) and save it again"
        )
    # the model ignores padding, but it looks up its embedding, which an added pad token may lack
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_sentencepiece(folder: Path, name: str) -> None:
    """Raise ModelError if sentencepiece is missing; transformers would misread its model as tiktoken's format."""
    if find_spec("sentencepiece") is None and not (folder / "tokenizer.json").is_file():
        for file in sorted(folder.glob("*.model")):
            raise ModelError(
                f"model.id: {name!r} has its tokenizer as a SentencePiece model ({file.name}), which needs the package "
                f"sentencepiece: pip install sentencepiece"
            ) from None
