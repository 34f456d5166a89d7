"""vLLM's plug-in: adapters of which a module finds no place are refused, and DoRA is served.

vLLM calls `register` in each of its processes. It changes methods of vLLM's classes, as there are no hooks for either:

- `WorkerLoRAManager._load_adapter`: each of the adapter's modules has to be one of the model's (`names.py`); vLLM looks
  only at the last word of a name, and computes the base where nothing else fits.
- `PEFTHelper._validate_features` lets DoRA pass; `LoRAModel.from_lora_tensors` keeps its magnitudes.
- `LoRAModelManager.activate_adapter` writes the factors of an adapter into the tables of each layer, at its slot;
  `BaseLinearLayerWithLoRA._apply_lora_to_output` scales rows by them.

A vLLM that lacks one of these is left as it is: it then refuses DoRA itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .dora import compute_factors, scale_rows, sum_squares
from .names import match_modules

MAGNITUDE = ".lora_magnitude_vector"
DORA = "RANKLOOM_VLLM_DORA"
"""0: DoRA is refused, and no step spends time on it."""

logger = logging.getLogger("vllm.rankloom")


def register() -> None:
    """Change vLLM, once a process."""
    try:
        from vllm.lora import lora_model
        from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.model_manager import LoRAModelManager
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.lora.worker_manager import WorkerLoRAManager

        if hasattr(WorkerLoRAManager._load_adapter, "__wrapped__"):
            return
        _ = lora_model.is_base_embedding_weights, lora_model.parse_fine_tuned_lora_name
        changes: list[tuple[Any, str, Callable[..., Any]]] = [(WorkerLoRAManager, "_load_adapter", _settle_after)]
        if os.environ.get(DORA) != "0":
            changes += [
                (lora_model, "is_base_embedding_weights", _skip_magnitudes),
                (LoRAModel, "from_lora_tensors", _keep_magnitudes),
                (LoRAModelManager, "_create_lora_modules", _make_tables_after),
                (LoRAModelManager, "activate_adapter", _write_factors_after),
                (BaseLinearLayerWithLoRA, "_apply_lora_to_output", _scale_after),
                (BaseLinearLayerWithLoRA, "_apply_async_impl", _scale_after),
                (PEFTHelper, "_validate_features", _allow_dora),
            ]
        changed = [(owner, name, change(getattr(owner, name))) for owner, name, change in changes]
    except (ImportError, AttributeError) as error:
        logger.warning("rankloom does not know this vLLM: DoRA is not served, names are not checked (%s)", error)
        return
    for owner, name, function in changed:
        setattr(owner, name, function)


def _skip_magnitudes(original: Callable[[str], bool]) -> Callable[[str], bool]:
    """vLLM passes over names of which this is true; `_keep_magnitudes` has them already."""
    return wraps(original)(lambda name: original(name) or name.removesuffix(".weight").endswith(MAGNITUDE))


def _allow_dora(original: Callable[[Any], list[str]]) -> Callable[[Any], list[str]]:
    return wraps(original)(lambda helper: original(replace(helper, use_dora=False)))


def _keep_magnitudes(original: Callable[..., Any]) -> Any:
    """Return the class method that also reads magnitudes, by module."""

    @wraps(original)
    def from_lora_tensors(
        cls: Any, lora_model_id: int, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        from vllm.lora.lora_model import parse_fine_tuned_lora_name

        lora = original.__func__(cls, lora_model_id, tensors, *args, **kwargs)  # type: ignore[attr-defined]
        lora.magnitudes = {}
        for name, tensor in tensors.items():
            stem = name.removesuffix(".weight")
            if stem.endswith(MAGNITUDE):
                as_lora = f"{stem.removesuffix(MAGNITUDE)}.lora_A.weight"
                module, _ = parse_fine_tuned_lora_name(as_lora, kwargs.get("weights_mapper"))
                lora.magnitudes[module] = tensor.float()
        return lora

    return classmethod(from_lora_tensors)


def _settle_after(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load_adapter(self: Any, lora_request: Any) -> Any:
        lora = original(self, lora_request)
        try:
            settle(self._adapter_manager, lora)
        except ValueError as error:
            raise ValueError(f"LoRA adapter {lora_request.lora_name}: {error}") from None
        return lora

    return load_adapter


def settle(manager: Any, lora: Any) -> None:
    """Give an adapter's weights the names of the model's modules. Raises ValueError where it can't be served whole."""
    from vllm.model_executor.models.utils import PPMissingLayer

    owners = {name: module for module in manager.modules for name in _list_parts(manager, module)}
    elsewhere = [name for name, module in manager.model.named_modules() if isinstance(module, PPMissingLayer)]
    names = match_modules(lora.loras, owners, elsewhere)
    lora.loras = {names.get(name, name): weights for name, weights in lora.loras.items()}
    magnitudes: dict[str, Tensor] = getattr(lora, "magnitudes", {})
    if not magnitudes:
        return
    lora.magnitudes = {names[name]: magnitude for name, magnitude in magnitudes.items() if name in names}
    for name in lora.magnitudes:
        if not _is_scaled(manager.modules[owners[name]]):
            raise ValueError(f"DoRA on {name} can't be served, only on linear layers")
    if manager.lora_config.fully_sharded_loras:
        raise ValueError("DoRA can't be served with --fully-sharded-loras")


def _list_parts(manager: Any, module: str) -> list[str]:
    """Return the names under which an adapter may have weights of a module."""
    parts = manager.packed_modules.get(module, [])
    return [*parts, module, f"{module}.base_layer"] if module.endswith(".experts") else parts or [module]


def _is_scaled(layer: Any) -> bool:
    return hasattr(getattr(type(layer), "_apply_lora_to_output", None), "__wrapped__")


def _make_tables_after(original: Callable[..., None]) -> Callable[..., None]:
    """Each layer has its factors, by slot, from before it is compiled: what changes later is what they hold."""

    @wraps(original)
    def create_lora_modules(self: Any) -> None:
        original(self)
        self.dora_slots = set()
        for layer in self.modules.values():
            if _is_scaled(layer):
                shape = self.lora_slots + 1, sum(layer.output_slices)
                layer.dora_slots = self.dora_slots
                layer.dora_factors = torch.ones(shape, device=layer.device)
                layer.dora_shifts = torch.zeros_like(layer.dora_factors) if _get_added_bias(layer) is not None else None

    return create_lora_modules


def _get_added_bias(layer: Any) -> Tensor | None:
    """Return the bias that a layer adds itself, before factors are applied."""
    from vllm.lora.layers import RowParallelLinearWithLoRA

    base = layer.base_layer
    not_here = isinstance(layer, RowParallelLinearWithLoRA) and layer.tp_rank > 0
    bias: Tensor | None = None if base.skip_bias_add or not_here else base.bias
    return bias


def _write_factors_after(original: Callable[..., bool]) -> Callable[..., bool]:
    @wraps(original)
    @torch.no_grad()
    def activate_adapter(self: Any, lora_id: int) -> bool:
        if not original(self, lora_id):
            return False
        slot, lora = self.lora_index_to_id.index(lora_id), self._registered_adapters.cache[lora_id]
        magnitudes = getattr(lora, "magnitudes", {})
        if slot not in self.dora_slots and not magnitudes:
            return True
        lora.factors = getattr(lora, "factors", {})
        (self.dora_slots.add if magnitudes else self.dora_slots.discard)(slot)
        for name, layer in self.modules.items():
            if not _is_scaled(layer):
                continue
            parts = self.packed_modules.get(name, [name])
            if magnitudes.keys() & set(parts) and name not in lora.factors:
                # on the host, as an adapter's A and B are: a device's memory is counted before adapters come
                lora.factors[name] = _compute_layer(layer, slot, [magnitudes.get(part) for part in parts]).cpu()
            layer.dora_factors[slot].copy_(lora.factors.get(name, torch.ones(1)))
            if layer.dora_shifts is not None:
                layer.dora_shifts[slot].copy_(_get_added_bias(layer) * (1 - layer.dora_factors[slot]))
        return True

    return activate_adapter


def _compute_layer(layer: Any, slot: int, magnitudes: list[Tensor | None]) -> Tensor:
    """Return the factors of a layer for the adapter in a slot; 1 where it has no magnitudes. On several GPUs: those of
    this one's outputs."""
    from vllm.distributed import tensor_model_parallel_all_reduce
    from vllm.lora.layers import RowParallelLinearWithLoRA

    pairs = [
        (a[slot, 0], b[slot, 0]) for a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
    ]  # scaled, and this GPU's part
    squares_O = sum_squares(lambda begin, end: _read_columns(layer, begin, end), pairs, layer.input_size)
    if isinstance(layer, RowParallelLinearWithLoRA) and layer.tp_size > 1:
        squares_O = tensor_model_parallel_all_reduce(squares_O)
    magnitude_O = _take_magnitudes(layer, magnitudes).to(squares_O.device)
    return torch.where(magnitude_O.isnan(), 1.0, compute_factors(magnitude_O, squares_O))


def _take_magnitudes(layer: Any, magnitudes: list[Tensor | None]) -> Tensor:
    """Return the magnitudes of a layer's outputs, NaN where there are none, as it takes its part of a B."""
    columns = [None if each is None else each.reshape(-1, 1) for each in magnitudes]
    if layer.n_slices == 1:
        (column,) = columns
        assert column is not None
        taken: Tensor = layer.slice_lora_b(column) if layer.tp_size > 1 else column
        return taken.flatten()
    if len(columns) != layer.n_slices:
        _, columns = layer.expand_packed_lora(columns, columns)
    if layer.tp_size > 1:
        columns = layer.slice_lora_b(columns)
    sizes = layer.output_slices
    return torch.cat([
        torch.full((size,), torch.nan) if each is None else each.flatten()
        for each, size in zip(columns, sizes, strict=True)
    ])  # fmt: skip


def _read_columns(layer: Any, begin: int, end: int) -> Tensor:
    """Return the base's weights [O, inputs] of some inputs; quantised ones as they act on one input at a time."""
    weight = getattr(layer.base_layer, "weight", None)
    readable = isinstance(weight, Tensor) and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if readable and weight.shape == (sum(layer.output_slices), layer.input_size):  # type: ignore[union-attr]
        return weight[:, begin:end]  # type: ignore[index]
    ones = torch.zeros(end - begin, layer.input_size, dtype=layer.lora_config.lora_dtype, device=layer.device)
    ones[torch.arange(end - begin), torch.arange(begin, end)] = 1
    columns: Tensor = layer._get_quant_method().apply(layer.base_layer, ones, None).T
    return columns


def _scale_after(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(original)
    def apply(self: Any, x: Tensor, output: Tensor | None = None) -> Tensor:
        y = original(self, x, output)
        tables = self.__dict__.get("dora_factors")
        if tables is None or (y.device.type == "cpu" and not torch.compiler.is_compiling() and not self.dora_slots):
            return y
        rows = y.flatten(0, -2)
        slots = self.punica_wrapper._token_lora_indices[: rows.shape[0]]
        return scale_rows(rows, slots, tables, self.dora_shifts).view_as(y)

    return apply
