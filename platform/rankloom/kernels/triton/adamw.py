"""The Triton kernel of `adamw.py`: one program a block of a slot's parameter; an idle slot costs one read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _step(
    data, first, second, gradient, settings, shadow,
    num_slots, size, stride_g, gradient_g, shadow_g, settings_s,
    num_ranks: tl.constexpr, inner: tl.constexpr, block: tl.constexpr, shadowed: tl.constexpr,
):  # fmt: skip
    g = (tl.program_id(0) // num_slots).to(tl.int64)
    slot = tl.program_id(0) % num_slots
    factor = tl.load(settings + slot)
    if factor != 0:
        i = tl.program_id(1) * block + tl.arange(0, block)
        rank = tl.load(settings + slot + 7 * settings_s).to(tl.int32)
        inside = (i < size) & (i // inner % num_ranks < rank)
        at = slot.to(tl.int64) * size + i
        one = settings + slot
        m = tl.load(first + g * stride_g + at, mask=inside, other=0.0)
        v = tl.load(second + g * stride_g + at, mask=inside, other=0.0)
        d = tl.load(gradient + g * gradient_g + at, mask=inside, other=0.0).to(tl.float32) * factor
        m += (d - m) * tl.load(one + settings_s)
        v += (d * d - v) * tl.load(one + 2 * settings_s)
        tl.store(first + g * stride_g + at, m, mask=inside)
        tl.store(second + g * stride_g + at, v, mask=inside)
        root = tl.sqrt_rn(v) * tl.load(one + 3 * settings_s) + tl.load(one + 4 * settings_s)
        w = tl.load(data + g * stride_g + at, mask=inside, other=0.0) * tl.load(one + 6 * settings_s)
        w -= m / root * tl.load(one + 5 * settings_s)
        tl.store(data + g * stride_g + at, w, mask=inside)
        if shadowed:
            tl.store(shadow + g * shadow_g + at, w.to(shadow.dtype.element_ty), mask=inside)


def slot_squares(stack: Tensor) -> Tensor:
    return torch.linalg.vector_norm(stack.flatten(2), dim=(0, 2), dtype=torch.float32).square_()


def slot_adamw(
    data: Tensor, first: Tensor, second: Tensor, gradient: Tensor, settings_SK: Tensor, shadow: Tensor | None,
    num_ranks: int, inner: int,
) -> None:  # fmt: skip
    num_groups, num_slots = data.shape[:2]
    size = data[0, 0].numel()
    copy = data if shadow is None else shadow
    _step[(num_groups * num_slots, triton.cdiv(size, BLOCK))](
        data, first, second, gradient, settings_SK, copy,
        num_slots, size, data.stride(0), gradient.stride(0), copy.stride(0), settings_SK.stride(0),
        num_ranks=num_ranks, inner=inner, block=BLOCK, shadowed=shadow is not None,
    )  # fmt: skip
