"""Folded: one adapter as the constants that serving it takes, whatever method it came from.

Training's bank (`bank.py`) computes what changes at every step, such as DoRA's norms; here nothing changes any more. So
scalings (alpha/r, rsLoRA's, a layer's own) go into B, a DoRA becomes a LoRA with a factor for each output, and biases
become one shift. What has no low rank, such as the norms of an extracted adapter, is kept as a module of its own.

Shapes: N tokens, I in, O out, R rank, V vocabulary, E width of an embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankloom.adapters.patterns import compute_lora_scaling
from rankloom.adapters.weights import find_adapted_experts, read_adapter
from rankloom.errors import RegistryError
from rankloom.models import chooses_experts, get_linear_widths, is_linear
from rankloom.models.quantized import read_weight
from rankloom.registry.checks import CONFIG, PREFIX, WEIGHTS


@dataclass(frozen=True)
class Factors:
    """What an adapter does to one linear: y becomes factor · (y + x A B) + shift."""

    a_RI: Tensor
    b_RO: Tensor
    """Scaled already."""
    factor_O: Tensor | None
    """DoRA's magnitudes over their norms, in fp32: they are near 1, where bf16 has steps of 0.008. None: 1. With
    `fold(keep_magnitudes=True)` the magnitudes themselves."""
    shift_O: Tensor | None
    """In fp32."""
    scale_R: Tensor | None = None
    """In fp32, what x A is multiplied by, where A and B are integers."""

    def add_to(self, y_NO: Tensor, x_NI: Tensor) -> None:
        """Change the base's result, of the same tokens, in place."""
        dtype = self.a_RI.dtype if self.scale_R is None else torch.float32
        h_NR, b_RO = x_NI.to(dtype) @ self.a_RI.T.to(dtype), self.b_RO.to(dtype)
        if self.scale_R is not None:
            h_NR *= self.scale_R
        if y_NO.dtype == dtype and (self.factor_O is None or y_NO.dtype == self.factor_O.dtype):
            y_NO.addmm_(h_NR, b_RO)
            if self.factor_O is not None:
                y_NO.mul_(self.factor_O)
        else:  # rounded once
            precise_NO = y_NO + (h_NR @ b_RO).float()
            y_NO.copy_(precise_NO if self.factor_O is None else precise_NO.mul_(self.factor_O))
        if self.shift_O is not None:
            y_NO.add_(self.shift_O)

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    def list_tensors(self) -> Iterator[Tensor]:
        tensors = self.a_RI, self.b_RO, self.factor_O, self.shift_O, self.scale_R
        yield from (t for t in tensors if t is not None)


@dataclass(frozen=True)
class EmbeddingFactors:
    """What an adapter does to an embedding: y becomes y + A[token] B."""

    a_VR: Tensor
    b_RE: Tensor

    def add_to(self, y_NE: Tensor, ids_N: Tensor) -> None:
        y_NE.addmm_(self.a_VR[ids_N], self.b_RE)


@dataclass(frozen=True)
class ExpertFactors:
    """What an adapter does to the experts of one module: by its parameter, W becomes W + left · right."""

    products: Mapping[str, tuple[Tensor, Tensor]]
    """[experts, rows of W, R] and [experts, R, columns of W], with the scaling in them."""

    def apply_to(self, module: nn.Module) -> nn.Module:
        """Return a module with these sums in place of its own stacks, and all else of it shared."""
        adapted = copy.copy(module)
        vars(adapted).pop("forward", None)  # a bank may have put its own there
        adapted._parameters = dict(module._parameters)
        for key, (left, right) in self.products.items():
            weight: Any = module._parameters[key]
            adapted._parameters[key] = torch.baddbmm(weight, left, right)  # type: ignore[assignment]
        return adapted

    def list_tensors(self) -> Iterator[Tensor]:
        for product in self.products.values():
            yield from product


@dataclass(frozen=True, eq=False)  # compared by identity: a key of dicts
class ServedAdapter:
    """One adapter; by the full names of the base's modules."""

    linears: dict[str, Factors]
    """A bank may replace them: by views of its table, or for a CPU by copies side by side."""
    embeddings: Mapping[str, EmbeddingFactors]
    whole: Mapping[str, nn.Module]
    """Modules that take the place of the base's own."""
    experts: Mapping[str, ExpertFactors] = field(default_factory=dict)

    @property
    def is_more_than_linears(self) -> bool:
        return bool(self.embeddings or self.whole or self.experts)

    @property
    def rank(self) -> int:
        """The largest of its linears'; 0: it has none."""
        return max((factors.rank for factors in self.linears.values()), default=0)

    @property
    def num_bytes(self) -> int:
        tensors = [t for factors in self.linears.values() for t in factors.list_tensors()]
        tensors += [t for factors in self.embeddings.values() for t in (factors.a_VR, factors.b_RE)]
        tensors += [t for factors in self.experts.values() for t in factors.list_tensors()]
        tensors += [t for module in self.whole.values() for t in module.state_dict().values()]
        return sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def fold(model: PreTrainedModel, folder: Path, *, keep_magnitudes: bool = False) -> ServedAdapter:
    """Read a PEFT folder for a base, which is only looked at.

    Args:
        keep_magnitudes: leave DoRA's norms to whoever has the base's weights, which this one then need not have.

    Raises:
        RegistryError: what in the folder is missing, corrupt, not allowed or does not fit, or can't be folded.
    """
    config, tensors = read_adapter(model, folder)
    reader = _Reader(model, folder, config, dict(tensors), keep_magnitudes)
    linears, embeddings, whole, experts = {}, {}, {}, {}
    ends = tuple(f".{target}" for target in config.target_modules)
    stacks = find_adapted_experts(model, config.target_parameters)
    for name, module in model.named_modules():
        if name in stacks:
            experts[name] = reader.fold_experts(name, module, stacks[name])
        elif _is_kept(name, config.modules_to_save):
            whole[name] = reader.copy_module(name, module)
        elif not f".{name}".endswith(ends):
            continue
        elif is_linear(module):
            linears[name] = reader.fold_linear(name, module)
        else:
            embeddings[name] = reader.fold_embedding(name, module)
    if reader.tensors:
        raise RegistryError(
            f"{folder / WEIGHTS}: tensor {min(reader.tensors)} has no place in the base with this {CONFIG}"
        )
    return ServedAdapter(linears, embeddings, whole, experts)


def _is_kept(name: str, modules_to_save: list[str] | None) -> bool:
    return any(name.endswith(target) for target in modules_to_save or [])  # as PEFT matches them


@dataclass(frozen=True)
class _Reader:
    """Takes an adapter's tensors one by one, so that what is left over shows."""

    model: PreTrainedModel
    folder: Path
    config: peft.LoraConfig
    tensors: dict[str, Tensor]
    keep_magnitudes: bool

    def fold_linear(self, name: str, module: nn.Module) -> Factors:
        rank, scaling = self._get_settings(name)
        num_in, num_out = get_linear_widths(module)
        a_RI = self._take(f"{name}.lora_A.weight", (rank, num_in))
        b_OR = self._take(f"{name}.lora_B.weight", (num_out, rank)) * scaling
        factor_O = shift_O = None
        if self.config.lora_bias:  # PEFT has it with LoRA alone
            shift_O = self._take(f"{name}.lora_B.bias", (num_out,)) * scaling
        if self.config.use_dora:
            factor_O = self._take(f"{name}.lora_magnitude_vector", (num_out,)).float()
        if factor_O is not None and not self.keep_magnitudes:
            factor_O = factor_O / self._compute_norms(module, a_RI, b_OR)
            bias_O = module.bias
            if isinstance(bias_O, Tensor):  # the base's own, which DoRA leaves as it is
                shift_O = bias_O * (1 - factor_O)
        return Factors(
            self._lay_out(a_RI),
            self._lay_out(b_OR.T),
            None if factor_O is None else self._lay_out(factor_O, torch.float32),
            None if shift_O is None else self._lay_out(shift_O, torch.float32),
        )

    def fold_embedding(self, name: str, module: nn.Module) -> EmbeddingFactors:
        if self.config.use_dora:
            raise RegistryError(
                f"{self.folder / CONFIG}: use_dora on the embedding {name} can't be served; train without it"
            )
        rank, scaling = self._get_settings(name)
        vocabulary, width = module.weight.shape  # type: ignore[misc]
        a_RV = self._take(f"{name}.lora_embedding_A", (rank, int(vocabulary)))
        b_ER = self._take(f"{name}.lora_embedding_B", (int(width), rank)) * scaling
        return EmbeddingFactors(self._lay_out(a_RV.T), self._lay_out(b_ER.T))

    def fold_experts(self, name: str, module: nn.Module, keys: list[str]) -> ExpertFactors:
        self._check_order(name, module)
        products = {}
        for i, key in enumerate(keys):
            rank, scaling = self._get_settings(f"{name}.{key}")
            count, rows, columns = module.get_parameter(key).shape
            turned = getattr(module, "is_transposed", False)  # [experts, in, out]
            num_in, num_out = (rows, columns) if turned else (columns, rows)
            wrapped = name + ".base_layer" * (len(keys) - 1 - i)  # PEFT wraps one parameter around the other
            a_ERI = self._take(f"{wrapped}.lora_A.weight", (rank * count, num_in)).view(count, rank, num_in)
            b_OX = self._take(f"{wrapped}.lora_B.weight", (num_out, rank * count))
            b_EOR = b_OX.view(num_out, rank, count).permute(2, 0, 1) * scaling
            left, right = (a_ERI.mT, b_EOR.mT) if turned else (b_EOR, a_ERI)
            products[key] = self._lay_out(left), self._lay_out(right)
        return ExpertFactors(products)

    def _check_order(self, name: str, module: nn.Module) -> None:
        if "Expert" in type(module).__name__ and not chooses_experts(module):
            raise RegistryError(
                f"{self.folder}: adapts the experts {name}, and the engine can't tell whose tokens reach which, for a "
                f"{type(module).__name__} gets them in another order; serve base and adapter as one model: rankloom "
                f"adapters export --format merged"
            )

    def copy_module(self, name: str, module: nn.Module) -> nn.Module:
        self._check_order(name, module)
        state = {key: self._take(f"{name}.{key}", tuple(value.shape)) for key, value in module.state_dict().items()}
        own = copy.deepcopy(module)
        vars(own).pop("forward", None)  # a bank may have put its own there
        own.load_state_dict(state)
        return own.requires_grad_(False)

    def _get_settings(self, name: str) -> tuple[int, float]:
        rank = self.config.rank_pattern.get(name, self.config.r)
        alpha = self.config.alpha_pattern.get(name, self.config.lora_alpha)
        return int(rank), compute_lora_scaling(alpha, int(rank), self.config.use_rslora)

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.tensors.pop(f"{PREFIX}{name}", None)
        file = self.folder / WEIGHTS
        if tensor is None:
            raise RegistryError(f"{file}: tensor {PREFIX}{name} is missing, though {CONFIG} asks for it")
        if tuple(tensor.shape) != shape:
            raise RegistryError(
                f"{file}: tensor {PREFIX}{name} has shape {list(tensor.shape)}, but the base and {CONFIG} ask for "
                f"{list(shape)}; is it another base's adapter?"
            )
        return tensor

    def _compute_norms(self, module: nn.Module, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """Return the norms [O] of the rows of W + BA; a zero row has norm 1, as its magnitude scales nothing."""
        dense_OI = read_weight(module, torch.float32)
        norms_O = torch.linalg.vector_norm(torch.addmm(dense_OI, b_OR, a_RI), dim=1)
        return norms_O.masked_fill_(norms_O == 0, 1)

    def _lay_out(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a copy laid out as the products read it; files may be mapped. dtype None: the base's activations'."""
        dtype = dtype or self.model.dtype
        return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format).copy_(tensor)
