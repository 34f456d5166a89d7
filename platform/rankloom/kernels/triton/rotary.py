"""The rotation of `rankloom.kernels.rotary`: one program a position, with all its heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _heads(x, y, heads, x_head, e, inside, cos_1, cos_2, sin_1, sin_2, half: tl.constexpr, block_heads: tl.constexpr):
    for start in range(0, heads, block_heads):
        head = start + tl.arange(0, block_heads)[:, None]
        here = inside & (head < heads)
        source, target = x + head * x_head + e, y + head * (2 * half) + e
        first = tl.load(source, mask=here, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=here, other=0.0).to(tl.float32)
        tl.store(target, (first * cos_1 - second * sin_1).to(y.dtype.element_ty), mask=here)
        tl.store(target + half, (second * cos_2 + first * sin_2).to(y.dtype.element_ty), mask=here)


@triton.jit
def _rotate(
    q, k, cos, sin, q_out, k_out, q_heads, k_heads, q_row, q_head, q_step, k_row, k_head, k_step, cos_row, cos_step,
    length, half: tl.constexpr, block_e: tl.constexpr, block_heads: tl.constexpr, back: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    row, step = at // length, at % length
    e = tl.arange(0, block_e)[None, :]
    inside = e < half
    angle = row * cos_row + step * cos_step + e
    cos_1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
    if back:
        sin_1, sin_2 = -sin_2, -sin_1
    q_at, k_at = q + row * q_row + step * q_step, k + row * k_row + step * k_step
    q_to, k_to = q_out + at * q_heads * (2 * half), k_out + at * k_heads * (2 * half)
    _heads(q_at, q_to, q_heads, q_head, e, inside, cos_1, cos_2, sin_1, sin_2, half, block_heads)
    _heads(k_at, k_to, k_heads, k_head, e, inside, cos_1, cos_2, sin_1, sin_2, half, block_heads)


def rotate(q_BHTE: Tensor, k_BJTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    q_BHTE, k_BJTE = _dense_heads(q_BHTE), _dense_heads(k_BJTE)
    cos_BTE, sin_BTE = cos_BTE.contiguous(), sin_BTE.contiguous()
    (rows, q_heads, length, width), k_heads = q_BHTE.shape, k_BJTE.shape[1]
    outputs = [
        torch.empty(rows, length, n, width, dtype=q_BHTE.dtype, device=q_BHTE.device) for n in (q_heads, k_heads)
    ]
    cos_row = 0 if len(cos_BTE) == 1 else cos_BTE.stride(0)
    _rotate[(rows * length,)](
        q_BHTE, k_BJTE, cos_BTE, sin_BTE, *outputs, q_heads, k_heads, *q_BHTE.stride()[:3], *k_BJTE.stride()[:3],
        cos_row, cos_BTE.stride(1), length, half=width // 2, block_e=triton.next_power_of_2(width // 2),
        block_heads=min(triton.next_power_of_2(q_heads), 16), back=back,
    )  # fmt: skip
    return outputs[0].transpose(1, 2), outputs[1].transpose(1, 2)


def _dense_heads(x_BHTE: Tensor) -> Tensor:
    return x_BHTE if x_BHTE.stride(-1) == 1 else x_BHTE.contiguous()
