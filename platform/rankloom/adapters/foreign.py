"""Converts any PEFT folder into a plain one that `weights.py` loads, with the result of `PeftModel.from_pretrained`.

The folder's tensors define which layers it adapts, and how; only settings that change the meaning of the tensors count.
So nothing that a setting names is imported, downloaded or run, and regular expressions have a time limit. The plain
folder names each layer in full. PiSSA and OLoRA change the base when PEFT loads them; here the change goes into the
factors.

Shapes: R rank, I in, O out.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankloom.adapters.patterns import ByModule, compute_lora_scaling, match_whole, resolve_patterns
from rankloom.adapters.weights import find_adapted_experts
from rankloom.errors import RegistryError
from rankloom.models import get_linear_widths, is_linear
from rankloom.registry.checks import CONFIG, PREFIX, WEIGHTS, find_files, read_config

_INSTEAD = "train a LoRA or DoRA without it, or merge it into its base with PEFT and serve that"
_PARTS = re.compile(
    r"(?P<layer>.+)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
)
_DRAWN = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Initialisations of A and B that leave the base unchanged."""
_MOVED = re.compile(r"pissa(_niter_\d+)?|(?i:olora)")
_VARIANTS = {field.name for field in dataclasses.fields(peft.LoraConfig) if field.metadata.get("is_lora_variant")}
_OTHER_PRODUCTS = sorted({*_VARIANTS, "layer_replication", "megatron_config"} - {"use_dora"})
"""Settings with which PEFT computes something else from these tensors, or on another base."""


class _Settings(BaseModel):
    """The settings of PEFT that define the meaning of tensors, with PEFT's defaults; others may be anything."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    peft_type: str
    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] = []
    ensure_weight_tying: bool = False

    @property
    def moves_base(self) -> bool:
        return bool(_MOVED.fullmatch(str(self.init_lora_weights)))

    @property
    def is_sampled(self) -> bool:
        return self.moves_base and "_niter_" in str(self.init_lora_weights)


@torch.no_grad()
def write_plain(model: PreTrainedModel, folder: Path, plain: Path, base_id: str) -> list[str]:
    """Write the adapter that PEFT would load from `folder` onto this base as a new folder `plain`.

    Args:
        model: the base, which is not changed.
        base_id: the base's id, for the new config.

    Returns:
        Notes for the user on settings of the folder that have no effect.

    Raises:
        RegistryError: it is not a LoRA or DoRA, or one that can't be served; names the tensor that shows it.
    """
    files = find_files(folder, (CONFIG, WEIGHTS))
    settings = _read_settings(files[CONFIG], folder / CONFIG)
    tensors = _read_tensors(files[WEIGHTS], folder / WEIGHTS)
    _check_kind(settings, tensors, folder)
    adapter = _Adapter(model, folder, settings)
    for name, tensor in adapter.to_current_names(tensors).items():
        adapter.take(name, tensor)
    adapter.write(plain, base_id)
    notes = []
    if settings.is_sampled:
        notes.append(f"init_lora_weights: with {settings.init_lora_weights} PEFT gives other logits on each loading")
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)} | {"peft_version"}
    if unknown := sorted(key for key, value in (settings.model_extra or {}).items() if value and key not in known):
        notes.append(f"PEFT {version('peft')} does not know, and ignores: {', '.join(unknown)[:200]}")
    return notes


def _read_settings(file: Path, shown: Path) -> _Settings:
    try:
        tree = {key: value for key, value in read_config(file).items() if value is not None}
        return _Settings.model_validate(tree)
    except RegistryError as error:
        raise RegistryError(str(error).replace(str(file), str(shown))) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = first["loc"][0]
        raise RegistryError(f"{shown}: {key}: {first['msg']} (given {tree[str(key)]!r:.80})") from None


def _read_tensors(file: Path, shown: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise RegistryError(f"{shown}: corrupt or truncated: {error}; save or fetch the adapter again") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.element_size() == 1:
            tensors[name] = tensor = tensor.float()
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise RegistryError(f"{shown}: tensor {name:.200} holds values that are not finite numbers")
    return tensors


def _check_kind(settings: _Settings, tensors: Iterable[str], folder: Path) -> None:
    """Raise RegistryError if the folder is not a LoRA or DoRA, whatever the names of its tensors."""
    if settings.peft_type != "LORA":
        other = next((name for name in sorted(tensors) if not re.search(r"\.lora_[AB]\.", name)), min(tensors))
        raise RegistryError(
            f"{folder / WEIGHTS}: tensor {other:.200} belongs to {settings.peft_type:.40}, and only LoRA and DoRA "
            f"are served: {_INSTEAD}"
        )
    extra: Mapping[str, Any] = settings.model_extra or {}
    for key in _OTHER_PRODUCTS:
        if extra.get(key):
            raise RegistryError(
                f"{folder / CONFIG}: {key}: {extra[key]!r:.80}: its tensors are not a plain LoRA or DoRA; {_INSTEAD}"
            )
    init = settings.init_lora_weights
    if isinstance(init, str) and init.lower() not in _DRAWN and not settings.moves_base:
        raise RegistryError(
            f"{folder / CONFIG}: init_lora_weights: {init!r:.80} gives PEFT another base on loading, which is not in "
            f"the folder; save it with path_initial_model_for_weight_conversion, or on the base that it was trained on"
        )


class _Adapter:
    """One adapter's tensors, by the full name of the base's module."""

    def __init__(self, model: PreTrainedModel, folder: Path, settings: _Settings) -> None:
        self._folder, self._file, self._settings = folder, folder / WEIGHTS, settings
        self._model = model
        self._modules = dict(model.named_modules())
        self._weights = model.state_dict()
        self._layers: dict[str, dict[str, Tensor]] = {}
        """Layer, or parameter of experts -> part -> tensor."""
        self._experts = find_adapted_experts(model, settings.target_parameters)
        self._places: dict[str, str] = {}
        """Parameter of experts -> prefix of its tensors' names: PEFT wraps one parameter around the other."""
        self._tied = self._find_tied() if settings.ensure_weight_tying else ()
        ends = tuple(settings.modules_to_save)  # as PEFT matches them
        kept = self._add_tied({name for name in self._modules if name.endswith(ends)})
        self._kept = {name: dict[str, Tensor]() for name in sorted(kept)}
        """Modules that replace the base's own -> their tensors."""

    def _find_tied(self) -> Sequence[str]:
        """Return the names of embedding and head if they share their weight, else nothing."""
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        if head is None or head.weight is not embedding.weight:
            return ()
        return [name for name, module in self._modules.items() if module in (embedding, head)]

    def _add_tied(self, layers: set[str]) -> set[str]:
        return layers.union(self._tied) if not layers.isdisjoint(self._tied) else layers

    def to_current_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under the names of this version of transformers, if they have those of an earlier one."""
        if self._all_fit(tensors):
            return tensors
        try:
            current = convert_peft_adapter_state_dict_for_transformers(self._model, peft.LoraConfig(), tensors)
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError):
            return tensors
        return current if self._all_fit(current) else tensors

    def _all_fit(self, tensors: Iterable[str]) -> bool:
        layers = (match["layer"] for name in tensors if (match := _PARTS.fullmatch(name.removeprefix(PREFIX))))
        return all(layer in self._modules or _strip_wrappers(layer) in self._experts for layer in layers)

    def take(self, name: str, tensor: Tensor) -> None:
        """Assign a tensor to its layer; compare a saved copy of a base's tensor with the base's, and leave it out."""
        place = name.removeprefix(PREFIX)
        if place == name:
            self._refuse(name, f"does not begin with {PREFIX}, as those that PEFT saves do")
        if "token_adapter." in name:
            self._refuse(name, f"trains single tokens, which can't be served: {_INSTEAD}")
        if match := _PARTS.fullmatch(place.removesuffix(".weight") if "magnitude_vector.weight" in place else place):
            return self._take_part(name, match["layer"], match["part"], tensor)
        if ".lora_" in name:
            self._refuse(name, f"is not a part of a LoRA or DoRA: {_INSTEAD}")
        place = re.sub(r"\.(base_layer|original_module)\.", ".", place)
        if place not in self._weights:
            self._refuse(name, "has no place in the base; is it another base's adapter? name its own with --base")
        weight = self._weights[place]
        if weight.shape != tensor.shape:
            self._refuse(
                name,
                f"has shape {list(tensor.shape)}, but the base's has {list(weight.shape)}: it was trained on a base of "
                f"another vocabulary or width; save that base with save_pretrained and name it with --base",
            )
        for module, kept in self._kept.items():
            if place.startswith(f"{module}.") and place in name:
                kept[place.removeprefix(f"{module}.")] = tensor
                return None
        types = (weight.dtype, torch.bfloat16, torch.float16)  # types that the base may have had when it was saved
        if not any(torch.equal(weight.to(each).to(tensor.dtype), tensor) for each in types):
            self._refuse(
                name,
                "is not the base's weight, and neither LoRA nor in modules_to_save: train it as one of these, or save "
                "the base that it belongs to and name it with --base",
            )
        return None

    def _take_part(self, name: str, layer: str, part: str, tensor: Tensor) -> None:
        if _strip_wrappers(layer) in self._experts:
            return self._take_experts(name, layer, part, tensor)
        module: Any = self._modules.get(layer.removesuffix(".base_layer"))  # PEFT wraps one of two parameters like this
        if module is None:
            self._refuse(name, f"belongs on {layer}, which the base lacks; is it another base's? name that with --base")
        embeds = isinstance(module, nn.Embedding)
        if not embeds and not is_linear(module):
            self._refuse(
                name,
                f"belongs on {layer}, a {type(module).__name__}, and only linear layers and embeddings are served "
                f"with a LoRA: train without it in target_modules and target_parameters",
            )
        if embeds and part == "lora_magnitude_vector":
            self._refuse(name, "is a DoRA on an embedding, which can't be served: train without it in target_modules")
        expected = ["lora_embedding_A", "lora_embedding_B"] if embeds else ["lora_A.weight", "lora_B.weight"]
        if self._settings.lora_bias and not embeds:
            expected.append("lora_B.bias")
        if self._settings.use_dora and not embeds:
            expected.append("lora_magnitude_vector")
        if part not in expected or layer not in self._modules or not self._is_target(layer):
            self._refuse(name, f"is none that PEFT would load with this {CONFIG}; restore the one it was saved with")
        self._layers.setdefault(layer, dict.fromkeys(expected, torch.empty(0)))[part] = tensor
        return None

    def _take_experts(self, name: str, layer: str, part: str, tensor: Tensor) -> None:
        module, settings = _strip_wrappers(layer), self._settings
        places = [module + ".base_layer" * depth for depth in range(len(self._experts[module]))]
        is_plain = not (settings.use_dora or settings.lora_bias or settings.moves_base)
        if layer not in places or not part.endswith(".weight") or not is_plain:
            self._refuse(name, f"is none that PEFT would load with this {CONFIG}; restore the one it was saved with")
        for key, place in zip(self._experts[module], reversed(places), strict=True):
            self._places[f"{module}.{key}"] = place
            parts = self._layers.setdefault(
                f"{module}.{key}", {"lora_A.weight": torch.empty(0), "lora_B.weight": torch.empty(0)}
            )
            if place == layer:
                parts[part] = tensor

    def _is_target(self, layer: str) -> bool:
        """Return whether PEFT would adapt a layer; if the config alone does not say so, its tensors do."""
        settings = self._settings
        if any(f"{layer}.".startswith(f"{module}.") for module in self._kept):
            return False
        if settings.target_parameters or settings.target_modules in (None, "all-linear"):
            return True
        excluded = settings.exclude_modules
        if isinstance(excluded, str) and self._matches("exclude_modules", excluded, layer):
            return False
        if isinstance(settings.target_modules, str):
            return self._matches("target_modules", settings.target_modules, layer)
        pattern = settings.layers_pattern or []
        names = SimpleNamespace(
            target_modules=settings.target_modules,
            exclude_modules=None if isinstance(excluded, str) else excluded,
            layers_to_transform=settings.layers_to_transform,
            layers_pattern=[re.escape(each) for each in ([pattern] if isinstance(pattern, str) else pattern)],
        )
        return any(check_target_module_exists(names, each) for each in self._add_tied({layer}))

    def _matches(self, key: str, expression: str, layer: str) -> bool:
        try:
            return match_whole(expression, layer)
        except ValueError as error:
            raise RegistryError(f"{self._folder / CONFIG}: {key}: {error}") from None

    def _refuse(self, name: str, reason: str) -> Any:
        raise RegistryError(f"{self._file}: tensor {name:.200} {reason}")

    def write(self, plain: Path, base_id: str) -> None:
        """Check that all tensors are there, and write the plain folder."""
        if not self._layers:
            raise RegistryError(f"{self._file}: holds no LoRA; publish the folder that PEFT's save_pretrained wrote")
        ranks, alphas = self._resolve_by_layer("rank_pattern"), self._resolve_by_layer("alpha_pattern")
        tensors: dict[str, Tensor] = {}
        for layer, parts in sorted(self._layers.items()):
            rank = ranks.get(layer, self._settings.r)
            alpha = alphas.get(layer, self._settings.lora_alpha)
            self._check_shapes(layer, parts, rank)
            if self._settings.moves_base and layer not in self._places and is_linear(self._modules[layer]):
                parts, rank, alpha = self._undo_base_change(
                    layer, parts, compute_lora_scaling(alpha, rank, self._settings.use_rslora)
                )
            ranks[layer], alphas[layer] = rank, alpha
            place = self._places.get(layer, layer)
            tensors |= {f"{PREFIX}{place}.{part}": tensor for part, tensor in parts.items()}
        for module, kept in self._kept.items():
            for key in self._modules[module].state_dict():
                if key not in kept:
                    self._refuse(f"{PREFIX}{module}.{key}", "is missing, though modules_to_save asks for it")
            tensors |= {f"{PREFIX}{module}.{key}": tensor for key, tensor in kept.items()}
        config = self._build_config(ranks, alphas, base_id)
        try:
            plain.mkdir(parents=True)
            contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
            save_file(contiguous, plain / WEIGHTS, metadata={"format": "pt"})
            config.save_pretrained(plain)
        except (OSError, SafetensorError) as error:
            raise RegistryError(f"{plain}: can't be written: {error}") from None

    def _resolve_by_layer(self, key: str) -> ByModule[Any]:
        try:
            return resolve_patterns(getattr(self._settings, key), self._layers)
        except ValueError as error:
            raise RegistryError(f"{self._folder / CONFIG}: {key}: {error}") from None

    def _check_shapes(self, layer: str, parts: Mapping[str, Tensor], rank: int) -> None:
        module: Any = self._modules.get(layer)
        count = 1
        if layer in self._places:
            count, num_out, num_in = self._weights[layer].shape
            if getattr(self._modules[layer.rpartition(".")[0]], "is_transposed", False):
                num_in, num_out = num_out, num_in
        elif is_linear(module):
            num_in, num_out = get_linear_widths(module)
            if self._settings.moves_base:  # PEFT can take no more than W's rank out of it
                rank = min(rank, num_in, num_out)
        else:
            num_in, num_out = module.weight.shape
        wanted = {"A": (count * rank, num_in), "B": (num_out, count * rank), "bias": (num_out,), "vector": (num_out,)}
        for part, tensor in parts.items():
            name = f"{PREFIX}{self._places.get(layer, layer)}.{part}"
            shape = wanted[re.split(r"[._]", part.removesuffix(".weight"))[-1]]
            if not tensor.numel():
                self._refuse(name, f"is missing or empty, though {CONFIG} asks for it; save the adapter again, whole")
            if tuple(tensor.shape) != shape:
                self._refuse(
                    name,
                    f"has shape {list(tensor.shape)}, but the base and {CONFIG} ask for {list(shape)}; is it another "
                    f"base's adapter?",
                )

    def _undo_base_change(
        self, layer: str, parts: dict[str, Tensor], scaling: float
    ) -> tuple[dict[str, Tensor], int, float]:
        """Return W - s·B₀·A₀ + s·B·A, which PEFT computes, as a LoRA of twice the rank on W: parts, rank and alpha."""
        after_RI, after_OR = parts["lora_A.weight"].float(), parts["lora_B.weight"].float()
        rank = len(after_RI)
        # PEFT samples pissa_niter_4 anew each time, near the decomposition that pissa uses
        init: Any = "pissa" if self._settings.is_sampled else self._settings.init_lora_weights
        alone = nn.ModuleDict({"layer": copy.deepcopy(self._modules[layer])})
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=scaling * rank,
            init_lora_weights=init,
            target_modules=["layer"],
            fan_in_fan_out=isinstance(self._modules[layer], Conv1D),
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peft.inject_adapter_in_model(config, alone)
        except (ValueError, TypeError, RuntimeError) as error:
            self._refuse(f"{PREFIX}{layer}.lora_A.weight", f"can't be undone for its init_lora_weights: {error}")
        initial: Any = alone["layer"]
        before_RI, before_OR = initial.lora_A["default"].weight.float(), initial.lora_B["default"].weight.float()
        moved = {
            "lora_A.weight": torch.cat([after_RI, before_RI]),
            "lora_B.weight": torch.cat([after_OR, -before_OR], dim=1),
        }
        return parts | moved, 2 * rank, 2 * rank * scaling

    def _build_config(self, ranks: Mapping[str, int], alphas: Mapping[str, float], base_id: str) -> peft.LoraConfig:
        first = max(ranks, key=lambda layer: ranks[layer])
        # PEFT takes the first key that ends a layer's name: the longer of two is the layer's own
        layers = sorted(ranks, key=len, reverse=True)
        return peft.LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_id,
            inference_mode=True,
            r=ranks[first],
            lora_alpha=alphas[first],
            rank_pattern={layer: ranks[layer] for layer in layers if ranks[layer] != ranks[first]},
            alpha_pattern={layer: alphas[layer] for layer in layers if alphas[layer] != alphas[first]},
            target_modules=sorted(layer for layer in ranks if layer not in self._places),
            target_parameters=sorted(self._places) or None,
            modules_to_save=sorted(self._kept) or None,
            use_rslora=self._settings.use_rslora and not self._settings.moves_base,
            use_dora=self._settings.use_dora,
            lora_bias=self._settings.lora_bias,
            fan_in_fan_out=any(isinstance(self._modules.get(layer), Conv1D) for layer in ranks),
        )


def _strip_wrappers(layer: str) -> str:
    return re.sub(r"(\.base_layer)+$", "", layer)
