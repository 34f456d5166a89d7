"""The only way to load an adapter folder into a base: nothing is unpickled, imported, downloaded or guessed.

An adapter may come from anyone. So its config may hold only what plain LoRA and DoRA need (PEFT's other settings can
import modules, read files or rewrite the base), and every tensor's name and shape is compared with the config before
PEFT reads a value. PEFT alone would ignore a surplus tensor and initialise a missing one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import peft
import torch
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from rankloom.adapters.modules import use_exact_module_names
from rankloom.adapters.patterns import resolve_patterns
from rankloom.errors import RegistryError
from rankloom.models import find_experts, is_linear
from rankloom.registry.checks import CONFIG, PICKLES, WEIGHTS, read_config

_IGNORED = {"base_model_name_or_path", "revision", "peft_version", "inference_mode"}
"""Settings without effect here: the base is given, and never looked up."""

_INITS = ("gaussian", "orthogonal")
"""Initialisations of A and B that do not affect the meaning of trained tensors."""

_Name = Annotated[str, Field(pattern=r"^[\w.\-]+$")]  # PEFT reads some names as regular expressions
_Rank = Annotated[int, Field(ge=1)]


class _AdapterConfig(BaseModel):
    """Settings of PEFT's LoraConfig that an adapter may change; all others must have PEFT's default."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    r: _Rank
    lora_alpha: float
    lora_dropout: float = 0.0
    target_parameters: list[_Name] | None = None
    target_modules: list[_Name]
    rank_pattern: dict[_Name, _Rank] = {}
    alpha_pattern: dict[_Name, float] = {}
    modules_to_save: list[_Name] | None = None
    fan_in_fan_out: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    lora_bias: bool = False
    bias: Literal["none"] = "none"
    init_lora_weights: bool | str = True

    @field_validator("target_modules")
    @classmethod
    def _has_targets(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if value or info.data.get("target_parameters"):
            return value
        raise ValueError("expected at least one, unless target_parameters has")

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _leaves_the_base(cls, value: Any) -> Any:
        if isinstance(value, bool) or value in _INITS:
            return value
        raise ValueError(f"expected true, false or one of {', '.join(_INITS)}; with others PEFT changes the base")


def load_adapter(base_model: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """Put an adapter folder onto a base, frozen and in eval mode. The base's modules are wrapped in place.

    Raises:
        RegistryError: a file or tensor is missing, corrupt, not allowed or does not fit; the base is unchanged.
    """
    config = _read_config(base_model, folder)
    shapes = _read_shapes(folder)
    _check_modules(base_model, config, folder)
    _check_parameters(base_model, config, folder)
    _check_ranks(config, shapes, folder)
    # for DoRA's norms, PEFT registers int8 weights of a CPU again, which the meta device would take
    on_meta = not (config.use_dora and base_model.device.type == "cpu" and hasattr(base_model, "is_loaded_in_8bit"))
    with warnings.catch_warnings():  # PEFT warns of tied embeddings and of biases; `extract.py` accounts for both
        warnings.simplefilter("ignore")
        try:
            with use_exact_module_names():
                model = peft.PeftModel(base_model, config, low_cpu_mem_usage=on_meta)
        except (ValueError, TypeError) as error:  # PEFT's refusals for this kind of base
            raise RegistryError(f"{folder}: PEFT can't put it onto the base: {error}") from None
        try:
            _check_shapes(get_peft_model_state_dict(model, save_embedding_layers=False), shapes, folder)
            tensors = _read_tensors(base_model, folder)
            set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=on_meta)
            # PEFT has rounded LoRA to the base's type while it left the meta device: set it again, in fp32
            cast_adapter_dtype(model, "default")
            set_peft_model_state_dict(model, tensors)
        except Exception:
            model.unload()
            raise
    return model.requires_grad_(False).eval()


def load_beside(base_model: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """Run `load_adapter` on a copy of the module tree around the base's own tensors; the base's modules stay unchanged.

    Raises:
        RegistryError: as in `load_adapter`.
    """
    # deepcopy does not copy objects in its memo
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*base_model.parameters(), *base_model.buffers())}
    return load_adapter(copy.deepcopy(base_model, shared), folder)


def read_adapter(base_model: PreTrainedModel, folder: Path) -> tuple[peft.LoraConfig, dict[str, torch.Tensor]]:
    """Read an adapter folder's config and tensors, to put them onto the base in another way than PEFT.

    The tensors' values and types are checked; the caller must compare names and shapes.

    Raises:
        RegistryError: a file or setting is missing, corrupt, not allowed or does not fit.
    """
    config = _read_config(base_model, folder)
    _check_modules(base_model, config, folder)
    _check_parameters(base_model, config, folder)
    _check_ranks(config, _read_shapes(folder), folder)
    return config, _read_tensors(base_model, folder)


def _read_config(base_model: PreTrainedModel, folder: Path) -> peft.LoraConfig:
    if not folder.is_dir():
        raise RegistryError(f"{folder}: no such adapter folder")
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in PICKLES:
            raise RegistryError(f"{file}: pickled weights can run code; remove the file, only {WEIGHTS} is read")
    file = folder / CONFIG
    if not file.exists():
        raise RegistryError(f"{file}: missing; {folder} is not a PEFT adapter")
    try:
        config = _AdapterConfig.model_validate(read_config(file))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise RegistryError(f"{file}: {key}: {reason} (given {first['input']!r:.80})") from None
    defaults = peft.LoraConfig().to_dict()
    for key, value in (config.model_extra or {}).items():
        if key not in _IGNORED and value and value != defaults.get(key):
            raise RegistryError(f"{file}: {key}: {value!r:.80} is not allowed; only plain LoRA and DoRA are loaded")
    settings: dict[str, Any] = config.model_dump(include=set(_AdapterConfig.model_fields) - {"peft_type"})
    names = [*(name for name, _ in base_model.named_modules()), *find_experts(base_model)]
    for pattern in ("rank_pattern", "alpha_pattern"):
        settings[pattern] = resolve_patterns(settings[pattern], names)
    # every value comes from the file, so none is initialised
    try:
        return peft.LoraConfig(**{**settings, "init_lora_weights": False, "inference_mode": True})
    except ValueError as error:  # settings that exclude each other
        raise RegistryError(f"{file}: {error}") from None


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape from the file's header."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise RegistryError(f"{file}: missing; {folder} is not a PEFT adapter")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in list(opened.keys())}
    except (SafetensorError, OSError) as error:
        raise RegistryError(f"{file}: corrupt or truncated: {error}; publish or fetch the adapter again") from None


def _check_modules(base_model: PreTrainedModel, config: peft.LoraConfig, folder: Path) -> None:
    """Raise the errors that PEFT would find only after it has wrapped a part of the base."""
    modules = dict(base_model.named_modules())
    ends = _group_by_ending(modules)
    for target in config.target_modules:
        if target not in ends:
            raise RegistryError(f"{folder / CONFIG}: target_modules: the base has no module {target!r}")
        for name in ends[target]:
            module = modules[name]
            if not is_linear(module) and not (isinstance(module, nn.Embedding) and not config.lora_bias):
                raise RegistryError(
                    f"{folder / CONFIG}: target_modules: {name} is a {type(module).__name__}, which this adapter "
                    f"can't be put on; allowed: linear layers, and embeddings where lora_bias is off"
                )
    for target in config.modules_to_save or []:
        if not any(name.endswith(target) for name in modules):
            raise RegistryError(f"{folder / CONFIG}: modules_to_save: the base has no module {target!r}")


def _check_parameters(base_model: PreTrainedModel, config: peft.LoraConfig, folder: Path) -> None:
    """Raise the errors of target_parameters, which may name only experts."""
    if not config.target_parameters:
        return
    experts, ends = find_experts(base_model), _group_by_ending(name for name, _ in base_model.named_parameters())
    for target in config.target_parameters:
        if not ends.get(target) or not all(name in experts for name in ends[target]):
            raise RegistryError(f"{folder / CONFIG}: target_parameters: {target!r} matches no experts of the base")
    for key in ("use_dora", "lora_bias", "lora_dropout", "fan_in_fan_out"):
        if getattr(config, key):
            raise RegistryError(f"{folder / CONFIG}: {key}: can't be combined with target_parameters")


def find_adapted_experts(base_model: PreTrainedModel, target_parameters: Iterable[str] | None) -> dict[str, list[str]]:
    """Return the experts that an adapter adapts: each module's full name -> its parameters in their order."""
    experts: dict[str, list[str]] = {}
    ends = tuple(f".{target}" for target in target_parameters or ())
    for name in find_experts(base_model):
        if f".{name}".endswith(ends):
            module, _, key = name.rpartition(".")
            experts.setdefault(module, []).append(key)
    return experts


def _group_by_ending(names: Iterable[str]) -> dict[str, list[str]]:
    """Return each ending of dotted names -> the full names that have it."""
    ends: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            ends.setdefault(".".join(parts[start:]), []).append(name)
    return ends


def _check_ranks(config: peft.LoraConfig, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Raise RegistryError for a rank that no tensor has, before PEFT allocates it."""
    ranks = [s[0] for name, s in shapes.items() if s and name.endswith((".lora_A.weight", ".lora_embedding_A"))]
    largest = max(ranks, default=0)
    for rank in (config.r, *config.rank_pattern.values()):
        if rank > largest:
            raise RegistryError(
                f"{folder / CONFIG}: r: rank {rank} is above that of every tensor in {WEIGHTS} ({largest})"
            )


def _check_shapes(expected: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    file = folder / WEIGHTS
    for name, tensor in expected.items():
        if name not in shapes:
            raise RegistryError(f"{file}: tensor {name} is missing, though {CONFIG} asks for it")
        if shapes[name] != tuple(tensor.shape):
            raise RegistryError(
                f"{file}: tensor {name} has shape {list(shapes[name])}, but the base and {CONFIG} ask for "
                f"{list(tensor.shape)}; is it another base's adapter?"
            )
    if unexpected := sorted(shapes.keys() - expected.keys()):
        raise RegistryError(f"{file}: tensor {unexpected[0]} has no place in the base with this {CONFIG}")


def _read_tensors(base_model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS
    device = next(base_model.parameters()).device
    if device.type == "meta":  # an outline of a base
        device = torch.device("cpu")
    try:
        tensors = load_file(file, device=str(device))
    except (SafetensorError, OSError) as error:
        raise RegistryError(f"{file}: corrupt or truncated: {error}; publish or fetch the adapter again") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise RegistryError(f"{file}: tensor {name} holds values that are not finite numbers")
        if ".lora_" in name:
            tensors[name] = tensor.float()  # as in training, whatever the base's type
        else:
            tensors[name] = tensor.to(base_model.dtype)
    return tensors
