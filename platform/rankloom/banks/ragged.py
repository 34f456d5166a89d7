"""The fast path of an adapted linear, on CUDA: few launches, no padding, no casts, no waiting for the device.

`grouped.py` is the plain path and the reference. Here A and B are read in the arithmetic's dtype from *shadows*, copies
that follow the fp32 parameters, and the low-rank product comes first: W x is added to it by the product's own
epilogue. All slots are computed at each site; idle ones have no tokens.

Shapes: N tokens sorted by slot, K slots, R rank, I in, O out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rankloom.kernels.ragged import (
    dora_scale,
    ragged_dropout,
    ragged_expand,
    ragged_expand_scaled,
    ragged_gradients,
    ragged_scale_backward,
    ragged_shrink,
)

if TYPE_CHECKING:
    from rankloom.banks.adapted_linear import AdaptedLinear


class SlotTensors:
    """What the fast path reads of a site's slots, on the device."""

    def __init__(self, a_KRI: Tensor, b_KOR: Tensor, dtype: torch.dtype) -> None:
        num_slots, device = len(a_KRI), a_KRI.device
        self.dtype = dtype
        self.a_KRI, self.b_KOR = a_KRI.detach().to(dtype, copy=True), b_KOR.detach().to(dtype, copy=True)
        """The shadows."""
        self.scale_K = torch.zeros(num_slots, device=device)
        self.rank_K = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.is_dora_K = torch.zeros(num_slots, dtype=torch.bool, device=device)


class SlotNoise(NamedTuple):
    """The dropout of each slot in a forward."""

    seed_K: Tensor
    rate_K: Tensor
    scales_base: bool
    """Whether a slot with dropout is DoRA, which scales W times the dropped input; the rest of W x stays unscaled."""


def ragged_linear(
    site: AdaptedLinear, slots: SlotTensors, x: Tensor, bounds: Tensor, noise: SlotNoise | None
) -> Tensor:
    """Return the linear's result [..., O] with each token's adapter.

    Args:
        bounds: see `kernels.ragged`.
        noise: None: without dropout.
    """
    magnitude_KO = site.m_KO if any(site.dora_ranks) else None
    y_NO: Tensor = _Linear.apply(x, site.a_KRI, site.b_KOR, magnitude_KO, site, slots, bounds, noise)
    return y_NO.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """W x and the low-rank product, with DoRA's scale and dropout.

    Dropout is drawn again in the backward pass, which is cheaper than to keep what it leaves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a_KRI: Tensor,  # noqa: ARG004  # read from the shadows; the gradients are these parameters'
        b_KOR: Tensor,  # noqa: ARG004
        magnitude_KO: Tensor | None,
        site: AdaptedLinear,
        slots: SlotTensors,
        bounds: Tensor,
        noise: SlotNoise | None,
    ) -> Tensor:
        x_NI, low_b_KRO = _flatten(x), slots.b_KOR.mT
        dropped_NI = _drop(x_NI, site, noise, bounds)
        h = ragged_shrink(dropped_NI, slots.a_KRI, slots.scale_K, slots.rank_K, bounds)
        weight_OI = site.get_dense_weight(slots.dtype)
        kept: list[Tensor] = []
        if magnitude_KO is not None:
            scale_KO, inverse_KO = dora_scale(
                weight_OI, site.squares_O, slots.a_KRI, slots.b_KOR, slots.scale_K, magnitude_KO, slots.is_dora_K
            )
            apart = noise is not None and noise.scales_base
            y_NO = (dropped_NI if apart else x_NI) @ weight_OI.T
            result_NO = ragged_expand_scaled(y_NO, h, low_b_KRO, scale_KO, site.bias_O, slots.rank_K, bounds)
            if apart:
                result_NO.addmm_(x_NI - dropped_NI, weight_OI.T)
            kept = [y_NO, scale_KO, inverse_KO]
        else:
            result_NO = ragged_expand(h, low_b_KRO, site.bias_O, slots.rank_K, bounds).addmm_(x_NI, weight_OI.T)
        ctx.save_for_backward(x, h, bounds, *kept)
        ctx.site, ctx.slots, ctx.noise = site, slots, noise
        return result_NO

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x, h, bounds, *kept = ctx.saved_tensors
        site, slots, noise, x_NI, dy_NO = ctx.site, ctx.slots, ctx.noise, _flatten(x), _flatten(dy_NO)
        scaled_NO, dmagnitude_KO = dy_NO, None
        if kept:
            y_NO, scale_KO, inverse_KO = kept
            scaled_NO, dmagnitude_KO = ragged_scale_backward(dy_NO, y_NO, scale_KO, inverse_KO, bounds)
        dh = ragged_shrink(scaled_NO, slots.b_KOR.mT, slots.scale_K, slots.rank_K, bounds)
        da_KRI, db_KOR = ragged_gradients(dh, _drop(x_NI, site, noise, bounds), h, scaled_NO, slots.rank_K, bounds)
        dx = None
        if ctx.needs_input_grad[0]:
            dx_NI = ragged_expand(dh, slots.a_KRI, None, slots.rank_K, bounds)
            if kept and noise is not None and noise.scales_base:
                dx_NI.addmm_(scaled_NO - dy_NO, site.get_dense_weight(slots.dtype))
                scaled_NO = dy_NO
            dx_NI = _drop(dx_NI, site, noise, bounds)
            dx = dx_NI.addmm_(scaled_NO, site.get_dense_weight(slots.dtype)).view(x.shape)
        return dx, da_KRI, db_KOR, dmagnitude_KO, None, None, None, None


def _drop(x_NI: Tensor, site: AdaptedLinear, noise: SlotNoise | None, bounds: Tensor) -> Tensor:
    return x_NI if noise is None else ragged_dropout(x_NI, noise.seed_K, noise.rate_K, site.salt, bounds)


def _flatten(x: Tensor) -> Tensor:
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()
