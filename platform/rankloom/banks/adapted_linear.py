"""AdaptedLinear: one linear of the frozen base with the adapters of all slots, and its forward.

`bank.py` has the sites of a whole model; read it first. `grouped.py` has the products.

Shapes: N tokens of all rows sorted by slot, K slots, C active slots, R rank, I in, O out.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankloom.adapters.patterns import compute_lora_scaling
from rankloom.banks.grouped import grouped_linear, grouped_lora, scale_rows
from rankloom.banks.groups import Groups
from rankloom.banks.ragged import SlotNoise, SlotTensors, ragged_linear
from rankloom.config.method import DoraConfig, LoraConfig
from rankloom.errors import IncompatibleError
from rankloom.models import find_target_linears, get_linear_widths
from rankloom.models.onednn import FrozenLinear
from rankloom.models.quantized import is_quantized, read_weight


@dataclass(frozen=True)
class SlotSpec:
    """The adapter in a slot: its shape, settings and initial values."""

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "gaussian"] = "default"
    dropout: float = 0.0
    """Probability, on the adapter's input; it acts where `apply_route` has a seed for the slot."""
    targets: tuple[str, ...] = ()
    """Full names of the linears that it adapts."""
    seed: int = 0
    """Seed of the initial A, which equals PEFT's after `torch.manual_seed(seed)`."""

    @classmethod
    def from_method(cls, method: LoraConfig | DoraConfig, model: PreTrainedModel, seed: int) -> SlotSpec:
        """Resolve a method's settings on a model.

        Raises:
            IncompatibleError: `method.init` would change the shared base.
        """
        if method.init not in ("default", "gaussian"):
            raise IncompatibleError(
                f"method.init: {method.init} can't be used in a bank (it starts from the base's weights or changes "
                f"them, and the base is shared); allowed: default, gaussian"
            )
        return cls(
            rank=method.rank,
            alpha=method.alpha,
            rslora=method.rslora,
            dora=isinstance(method, DoraConfig),
            init="gaussian" if method.init == "gaussian" else "default",
            dropout=method.dropout,
            targets=tuple(find_target_linears(model, method.target_modules)),
            seed=seed,
        )

    @property
    def scaling(self) -> float:
        return compute_lora_scaling(self.alpha, self.rank, self.rslora)


class AdaptedLinear:
    """One target linear with the adapters of all slots."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        num_slots: int,
        max_rank: int,
        *,
        with_magnitudes: bool,
        fast: torch.dtype | None = None,
    ) -> None:
        """Allocate the slots; `fast`: the dtype of the arithmetic on the fast path, None: that path is not used."""
        self.name, self.module = name, module
        self.salt = zlib.crc32(name.encode()) >> 1
        """What its dropout on the fast path differs by from other sites'."""
        self.base: Callable[[Tensor], Tensor] = module.forward
        """The linear's own forward."""
        self.num_in, self.num_out = get_linear_widths(module)
        self.is_plain = type(module) in (nn.Linear, FrozenLinear, Conv1D) and "forward" not in vars(module)
        """Whether W is a plain tensor, neither quantised nor in a special kernel's layout."""
        device = module.get_parameter("weight").device
        self.a_KRI = nn.Parameter(torch.zeros(num_slots, max_rank, self.num_in, device=device))
        self.b_KOR = nn.Parameter(torch.zeros(num_slots, self.num_out, max_rank, device=device))
        self.m_KO = nn.Parameter(torch.zeros(num_slots, self.num_out, device=device)) if with_magnitudes else None
        self.ranks = [0] * num_slots
        """The rank of each slot's adapter; 0 where the slot has none on this layer."""
        self.dora_ranks = [0] * num_slots
        """The rank of each slot's adapter; 0 where it is not DoRA."""
        self.scales = [0.0] * num_slots
        self._squares_O: Tensor | None = None
        is_known = self.is_plain or is_quantized(module)
        self.slots = SlotTensors(self.a_KRI, self.b_KOR, fast) if fast is not None and is_known else None
        """None: the fast path is not used here; it needs a linear whose product is one with `dense_weight`."""

    @property
    def weight_OI(self) -> Tensor:
        """W in its stored dtype."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def bias_O(self) -> Tensor | None:
        bias = self.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def get_parts(self, slot: int) -> dict[str, Tensor]:
        """Return views of a slot's values, without padding."""
        rank = self.ranks[slot]
        found = {"a": self.a_KRI.data[slot, :rank], "b": self.b_KOR.data[slot, :, :rank]}
        if self.dora_ranks[slot] and self.m_KO is not None:
            found["m"] = self.m_KO.data[slot]
        return found

    def assign(self, slot: int, rank: int, scaling: float, *, dora: bool) -> None:
        self.ranks[slot], self.dora_ranks[slot] = rank, rank if dora else 0
        self.scales[slot] = scaling
        if self.slots is not None:
            self.slots.scale_K[slot], self.slots.rank_K[slot], self.slots.is_dora_K[slot] = scaling, rank, dora

    def update_shadows(self, slot: int) -> None:
        """Copy a slot's values to where the fast path reads them."""
        if self.slots is not None:
            self.slots.a_KRI[slot].copy_(self.a_KRI.data[slot])
            self.slots.b_KOR[slot].copy_(self.b_KOR.data[slot])

    def clear(self, slot: int) -> None:
        self.assign(slot, 0, 0.0, dora=False)
        for stack in (self.a_KRI, self.b_KOR, self.m_KO):
            if stack is not None:
                stack.data[slot].zero_()
        self.update_shadows(slot)

    @torch.no_grad()
    def compute_row_norms(self, groups: Groups) -> Tensor:
        """Return [K, O]: the norms that divide the active slots' magnitudes; 1 for the other slots."""
        assert self.m_KO is not None
        slots = groups.get_index(self.m_KO.device)
        norm_KO = torch.ones_like(self.m_KO)
        norm_KO[slots] = self.compute_norms(slots, groups.rank, groups.get_scales(self.scales, norm_KO)[:, :, 0])
        return norm_KO

    @torch.no_grad()
    def compute_norms(self, slots: slice | Tensor, rank: int, scale_C1: Tensor) -> Tensor:
        """Return [C, O]: the norms of the rows of W + s B A for some slots, without computing B A.

        |w + s d|^2 = |w|^2 + 2 s <w, d> + s^2 |d|^2 with d a row of B A, so that <w, d> is the row product of B and
        W A^T, and |d|^2 that of B and B (A A^T). The norm of a zero row is set to 1, to avoid a division by zero.

        Args:
            rank: the largest rank among these slots.
            scale_C1: s of each slot.
        """
        dense_OI = self.get_dense_weight(torch.float32)
        a_CRI, b_COR = self.a_KRI[slots, :rank], self.b_KOR[slots, :, :rank]
        across_OCR = (dense_OI @ a_CRI.flatten(0, 1).T).view(self.num_out, -1, rank)
        across_CO = (across_OCR.transpose(0, 1) * b_COR).sum(-1)
        own_CO = (torch.bmm(b_COR, torch.bmm(a_CRI, a_CRI.mT)) * b_COR).sum(-1)
        squares_CO = self.squares_O + 2 * scale_C1 * across_CO + scale_C1.square() * own_CO
        return squares_CO.masked_fill_(squares_CO <= 0, 1).sqrt_()

    @property
    def squares_O(self) -> Tensor:
        """The square of each row's norm of W, in fp32."""
        if self._squares_O is None:
            dense_OI = self.weight_OI if self.is_plain else self.get_dense_weight(torch.float32)
            self._squares_O = torch.linalg.vector_norm(dense_OI, dim=1, dtype=torch.float32).square()
        return self._squares_O

    def get_dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Return W [O, I], dequantised."""
        return read_weight(self.module, dtype)


@dataclass(frozen=True)
class TokenRouting:
    """The assignment of one forward's tokens to slots."""

    counts_K: tuple[int, ...]
    """Number of tokens of each slot."""
    start: int
    """Number of tokens without a slot, which come first."""
    dropout: dict[int, tuple[float, torch.Generator]]
    """Slot -> probability and random generator, for the slots with dropout in this forward."""
    groups: dict[tuple[int, ...], Groups]
    """Cache by the slots' ranks on a layer; most layers share one entry."""
    bounds: Tensor | None = None
    """For the fast path: see `kernels.ragged`."""
    noise: SlotNoise | None = None
    """What `dropout` says, for the fast path."""

    def get_groups(self, ranks: Sequence[int]) -> Groups:
        """Return the groups of tokens for a layer, given the slots' ranks there."""
        key = tuple(ranks)
        if key not in self.groups:
            self.groups[key] = Groups(self.counts_K, key, start=self.start)
        return self.groups[key]


def apply_adapters(site: AdaptedLinear, route: TokenRouting, x: Tensor) -> Tensor:
    """Compute a linear with each token's adapter."""
    if _is_fast(site, route, x):
        assert site.slots is not None
        assert route.bounds is not None
        return ragged_linear(site, site.slots, x, route.bounds, route.noise) if any(site.ranks) else site.base(x)
    groups = route.get_groups(site.ranks)
    if not groups.slots:
        return site.base(x)
    assert x.numel() == groups.num_tokens * site.num_in, "the input does not have the tokens of `apply_route`"
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    a_KRI, b_KOR = site.a_KRI.to(dtype), site.b_KOR.to(dtype)
    magnified = route.get_groups(site.dora_ranks)
    dropped = [slot for slot in groups.slots if slot in route.dropout]
    # DoRA's factors are close to 1, so rounding before them would hide their effect: keep W x + B A x in fp32, as PEFT
    precise = bool(magnified.slots) and dtype != torch.float32
    restore_NO = None
    if not dropped and not precise and site.is_plain and (autocast or x.dtype == site.weight_OI.dtype == dtype):
        bias_O = None if site.bias_O is None else site.bias_O.to(dtype)
        y = grouped_linear(x.to(dtype), site.weight_OI.to(dtype), bias_O, a_KRI, b_KOR, site.scales, groups)
    else:
        base = site.base(x).contiguous()
        if base._is_view() and base.requires_grad:  # as of NF4 with a bias: torch refuses to change it in place
            base = base.clone()
        base = base.float() if precise else base
        onto, x_dropped = base, x
        if dropped:
            x_dropped = x * _draw_mask(x, dropped, groups, route)
            if recomputed := [slot for slot in dropped if slot in magnified.slots]:
                onto, restore_NO = _recompute_base(site, base, x_dropped, recomputed, groups)
        y = grouped_lora(onto, x_dropped.to(dtype), a_KRI, b_KOR, site.scales, groups)
    if magnified.slots:
        assert site.m_KO is not None
        with torch.autocast(kind, enabled=False):
            factor_KO = site.m_KO / site.compute_row_norms(magnified)  # norms get no gradient: DoRA, section 4.3
        y = scale_rows(y, factor_KO, site.bias_O, magnified, dtype=dtype if precise else None)
    return y if restore_NO is None else y + restore_NO.view(y.shape).to(y.dtype)


def _is_fast(site: AdaptedLinear, route: TokenRouting, x: Tensor) -> bool:
    """Return whether a site's tokens take the fast path: where all is of one dtype."""
    return (
        site.slots is not None
        and route.bounds is not None
        and x.dtype == site.slots.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )


def _draw_mask(x: Tensor, dropped: Sequence[int], groups: Groups, route: TokenRouting) -> Tensor:
    mask = torch.ones_like(x)
    mask_NI = mask.view(-1, x.shape[-1])
    for slot in dropped:
        probability, generator = route.dropout[slot]
        mask_NI[groups.spans[slot]].bernoulli_(1 - probability, generator=generator).div_(1 - probability)
    return mask


def _recompute_base(
    site: AdaptedLinear, base: Tensor, x_dropped: Tensor, slots: Sequence[int], groups: Groups
) -> tuple[Tensor, Tensor]:
    """Compute W x from the dropped input for DoRA slots: like PEFT, DoRA scales that one, and W x stays unscaled.

    Returns:
        The base's result, with W times the dropped input for these slots; and [N, O], the difference to W x, to add
        after scaling.
    """
    spans = [groups.spans[slot] for slot in slots]
    tokens_M = torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(base.device)
    base_NO = base.view(-1, site.num_out)
    again_MO = site.base(x_dropped.reshape(-1, site.num_in).index_select(0, tokens_M)).to(base.dtype)
    onto = base_NO.index_copy(0, tokens_M, again_MO).view(base.shape)
    difference_MO = base_NO.index_select(0, tokens_M) - again_MO
    return onto, torch.zeros_like(base_NO).index_copy(0, tokens_M, difference_MO)


def draw_like_peft(spec: SlotSpec, num_in: int, num_out: int, generator: torch.Generator) -> Tensor:
    """Return [R, I], the initial A as PEFT draws it: two linear layers draw their weights, then A is drawn again."""
    a_RI = torch.empty(spec.rank, num_in)
    nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
    nn.init.kaiming_uniform_(torch.empty(num_out, spec.rank), a=math.sqrt(5), generator=generator)
    if spec.init == "gaussian":
        return nn.init.normal_(a_RI, std=1 / spec.rank, generator=generator)
    return nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
