"""The norms of `rankloom.kernels.norms`: one program a row, which it reads once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(x, residual, weight, y, total, inverse, eps, width: tl.constexpr, block: tl.constexpr, add: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, block)
    inside = at < width
    value = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    if add:
        value += tl.load(residual + row + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row + at, (value * factor * scale).to(y.dtype.element_ty), mask=inside)
    tl.store(inverse + tl.program_id(0), factor)


@triton.jit
def _backward(dy, x, weight, inverse, onto, dx, width: tl.constexpr, block: tl.constexpr, add: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, block)
    inside = at < width
    factor = tl.load(inverse + tl.program_id(0))
    normed = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32) * factor
    scaled = tl.load(dy + row + at, mask=inside, other=0.0).to(tl.float32)
    scaled *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    value = factor * (scaled - normed * (tl.sum(scaled * normed, 0) / width))
    if add:
        value += tl.load(onto + row + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row + at, value.to(dx.dtype.element_ty), mask=inside)


def rms_norm_forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    y, inverse_N = torch.empty_like(x), _one_a_row(x)
    _forward[(len(inverse_N),)](x, x, weight_D, y, y, inverse_N, eps, **_sizes(x), add=False)
    return y, inverse_N


def add_rms_norm_forward(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = x.contiguous(), residual.contiguous()
    y, total, inverse_N = torch.empty_like(x), torch.empty_like(x), _one_a_row(x)
    _forward[(len(inverse_N),)](x, residual, weight_D, y, total, inverse_N, eps, **_sizes(x), add=True)
    return y, inverse_N, total


def rms_norm_backward(dy: Tensor, x: Tensor, weight_D: Tensor, inverse_N: Tensor, dx_onto: Tensor | None) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    onto = dy if dx_onto is None else dx_onto.contiguous()
    _backward[(len(inverse_N),)](dy, x, weight_D, inverse_N, onto, dx, **_sizes(x), add=dx_onto is not None)
    return dx


def _one_a_row(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _sizes(x: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(x.shape[-1])
    return {"width": x.shape[-1], "block": block, "num_warps": min(max(block // 512, 1), 16)}
