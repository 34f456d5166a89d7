"""The kernels of `rankloom.kernels.lora`.

Weights are read once a block of tokens, at the adapter's own rank: programs beyond it end at once. Blocks of one token,
as in decoding, are sums on the vector units; longer ones use tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

RANKS = 16
"""Rank rows that a program takes at once."""
OUTPUTS = 128
"""Outputs of a program of `lora_expand`."""


def lora_shrink(
    x_NI: Tensor, a_PXI: Tensor, slots_PK4: Tensor, slot_G: Tensor, start_G1: Tensor, block: int, rank: int, splits: int
) -> Tensor:
    num_tokens, num_in = x_NI.shape
    h_SND = x_NI.new_empty(splits, num_tokens, len(a_PXI) * rank, dtype=torch.float32)
    inputs = min(512 if block == 1 else 128, triton.next_power_of_2(num_in))
    grid = (len(slot_G), splits, len(a_PXI) * triton.cdiv(rank, RANKS))
    _shrink[grid](
        x_NI, a_PXI, h_SND, slots_PK4, slot_G, start_G1,
        x_NI.stride(0), a_PXI.stride(0), a_PXI.stride(1), h_SND.stride(0), h_SND.stride(1), slots_PK4.stride(0),
        num_in, rank, triton.cdiv(triton.cdiv(num_in, splits), inputs) * inputs, inputs, block, RANKS,
        _precision(x_NI),
    )  # fmt: skip
    return h_SND


def lora_expand(
    y_NO: Tensor, h_SND: Tensor, b_XO: Tensor, vectors_VO: Tensor, slots_PK4: Tensor, slot_G: Tensor,
    start_G1: Tensor, block: int, widths: list[int],
) -> None:  # fmt: skip
    grid, rank = (len(slot_G), sum(triton.cdiv(width, OUTPUTS) for width in widths)), h_SND.shape[-1] // len(widths)
    ranks = min(max(triton.next_power_of_2(rank), RANKS), 64) if block == 1 else RANKS
    _expand[grid](
        y_NO, h_SND, b_XO, vectors_VO, slots_PK4, slot_G, start_G1,
        y_NO.stride(0), h_SND.stride(0), h_SND.stride(1), b_XO.stride(0), vectors_VO.stride(0), slots_PK4.stride(0),
        rank, tuple(widths), len(h_SND), block, ranks, OUTPUTS,
        all(width % 16 == 0 for width in widths), _precision(y_NO),
    )  # fmt: skip


def _precision(x: Tensor) -> str:
    """Return how tensor cores may round fp32: bf16 values are exact in tf32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def _shrink(
    x, a, h, slots, slot_of, start_of,
    x_n, a_p, a_x, h_s, h_n, slots_p,
    NUM_IN: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, INPUTS: tl.constexpr, TOKENS: tl.constexpr,
    RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, split, part_and_first = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    part, first = part_and_first // tl.cdiv(R, RANKS), part_and_first % tl.cdiv(R, RANKS) * RANKS
    slot = tl.load(slot_of + block)
    if slot < 0:
        return
    entry = slots + part * slots_p + slot * 4
    row, rank = tl.load(entry), tl.load(entry + 1)
    if first >= rank:
        return
    start, stop = tl.load(start_of + block), tl.load(start_of + block + 1)
    n = start + tl.arange(0, TOKENS)
    r = first + tl.arange(0, RANKS)
    a_rows = a + part.to(tl.int64) * a_p + (row + r).to(tl.int64) * a_x
    x_rows = x + n.to(tl.int64) * x_n
    h_NR = tl.zeros((TOKENS, RANKS), tl.float32)
    for at in range(split * SPLIT, min((split + 1) * SPLIT, NUM_IN), INPUTS):
        i = at + tl.arange(0, INPUTS)
        x_NI = tl.load(x_rows[:, None] + i[None, :], mask=(n < stop)[:, None] & (i < NUM_IN)[None, :], other=0.0)
        a_RI = tl.load(a_rows[:, None] + i[None, :], mask=(r < rank)[:, None] & (i < NUM_IN)[None, :], other=0.0)
        if TOKENS == 1:
            h_NR += tl.sum(x_NI.to(tl.float32) * a_RI.to(tl.float32), 1)[None, :]
        else:
            h_NR = tl.dot(x_NI.to(tl.float32), tl.trans(a_RI.to(tl.float32)), h_NR, input_precision=PRECISION)
    h_at = h + split * h_s + n.to(tl.int64)[:, None] * h_n + (part * R + r)[None, :]
    tl.store(h_at, h_NR, mask=(n < stop)[:, None] & (r < rank)[None, :])


@triton.jit
def _expand(
    y, h, b, vectors, slots, slot_of, start_of,
    y_n, h_s, h_n, b_x, vectors_v, slots_p,
    R: tl.constexpr, WIDTHS: tl.constexpr, SPLITS: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr,
    OUTPUTS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slot_of + block)
    if slot < 0:
        return
    part, first, last, tiles, outputs = 0, 0, 0, 0, 0
    for p in tl.static_range(len(WIDTHS)):
        if tile >= tiles:
            part, first, last = p, outputs + (tile - tiles) * OUTPUTS, outputs + WIDTHS[p]
        tiles += tl.cdiv(WIDTHS[p], OUTPUTS)
        outputs += WIDTHS[p]
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    entry = slots + part * slots_p + slot * 4
    row, rank = tl.load(entry), tl.load(entry + 1)
    factor, shift = tl.load(entry + 2), tl.load(entry + 3)
    if (rank == 0) & (factor < 0) & (shift < 0):
        return
    start, stop = tl.load(start_of + block), tl.load(start_of + block + 1)
    n, o = start + tl.arange(0, TOKENS), first + tl.arange(0, OUTPUTS)
    y_at = y + n.to(tl.int64)[:, None] * y_n + o[None, :]
    inside = (n < stop)[:, None] & (o < last)[None, :]
    y_NO = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    for begin in range(0, rank, RANKS):
        r = begin + tl.arange(0, RANKS)
        h_at = h + n.to(tl.int64)[:, None] * h_n + (part * R + r)[None, :]
        known = (n < stop)[:, None] & (r < rank)[None, :]
        h_NR = tl.zeros((TOKENS, RANKS), tl.float32)
        for split in tl.static_range(SPLITS):
            h_NR += tl.load(h_at + split * h_s, mask=known, other=0.0)
        b_at = b + (row + r).to(tl.int64)[:, None] * b_x + o[None, :]
        b_RO = tl.load(b_at, mask=(r < rank)[:, None] & (o < last)[None, :], other=0.0)
        if TOKENS == 1:
            y_NO += tl.sum(tl.trans(h_NR) * b_RO.to(tl.float32), 0)[None, :]
        else:
            y_NO = tl.dot(h_NR, b_RO.to(tl.float32), y_NO, input_precision=PRECISION)
    if factor >= 0:
        y_NO *= tl.load(vectors + factor.to(tl.int64) * vectors_v + o, mask=o < last, other=1.0)[None, :]
    if shift >= 0:
        y_NO += tl.load(vectors + shift.to(tl.int64) * vectors_v + o, mask=o < last, other=0.0)[None, :]
    tl.store(y_at, y_NO.to(y.dtype.element_ty), mask=inside)
