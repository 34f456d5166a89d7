"""The kernels of `rankloom.kernels.ragged`.

A program takes a tile of one slot's tokens; it finds them in `bounds`, so that the grid depends on N and K alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """How a kernel divides its work."""

    tokens: int
    width: int
    num_warps: int = 4
    num_stages: int = 3
    loops: int = 1
    """Tiles of the wide side that a program takes one after the other."""


SHRINK, EXPAND, GRADIENTS = Tile(64, 64), Tile(64, 128, num_stages=2, loops=4), Tile(32, 128)
FEW, FEW_TOKENS = 2048, 16
"""Up to so many tokens, tiles have few, so that more programs share the work."""
RANKS, FEW_RANKS = 64, 16
"""Most rank rows that a program takes at once, and those that it takes of a slot with so few."""
PROGRAMS = 264
"""Programs that fill a GPU: two for each multiprocessor of an H100."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bits of bf16 values
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _tile(bounds, tile, NUM_SLOTS: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr):
    """Return a tile's slot, -1 or K where it is nobody's, its first token, and the token after its slot's last."""
    group = tl.arange(0, GROUPS)
    is_group = group < NUM_SLOTS + 2
    start = tl.load(bounds + group, mask=is_group, other=0)
    stop = tl.load(bounds + group + 1, mask=is_group, other=0)
    tiles = (stop - start + TOKENS - 1) // TOKENS
    mine = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(group < mine, tiles, 0), 0)
    first = tl.sum(tl.where(group == mine, start, 0), 0) + (tile - before) * TOKENS
    return mine - 1, first, tl.sum(tl.where(group == mine, stop, 0), 0)


@triton.jit
def _shrink(
    x, factor, scale, ranks, bounds, h,
    x_n, f_k, f_r, f_d, h_s, width, rank, split,
    NUM_SLOTS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, FEW: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slot, first, stop = _tile(bounds, tl.program_id(0), NUM_SLOTS, TOKENS, GROUPS)
    if (slot < 0) | (slot >= NUM_SLOTS):
        return
    own, begin = tl.load(ranks + slot), tl.program_id(2) * RANKS
    if begin >= own:
        return
    factor += slot.to(tl.int64) * f_k
    start, end = tl.program_id(1) * split, min((tl.program_id(1) + 1) * split, width)
    h += tl.program_id(1).to(tl.int64) * h_s
    rate = tl.load(scale + slot)
    if own <= FEW:
        _shrink_tile(
            x, factor, rate, h, first, stop, begin, own, start, end, x_n, f_r, f_d, rank,
            TOKENS, FEW, BLOCK, PRECISION,
        )  # fmt: skip
    else:
        _shrink_tile(
            x, factor, rate, h, first, stop, begin, own, start, end, x_n, f_r, f_d, rank,
            TOKENS, RANKS, BLOCK, PRECISION,
        )  # fmt: skip


@triton.jit
def _shrink_tile(
    x, factor, rate, h, first, stop, begin, own, start, end, x_n, f_r, f_d, rank,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, r = first + tl.arange(0, TOKENS), begin + tl.arange(0, RANKS)
    rows = x + n.to(tl.int64)[:, None] * x_n
    columns = factor + r[None, :] * f_r
    here, known = (n < stop)[:, None], (r < own)[None, :]
    total = tl.zeros((TOKENS, RANKS), tl.float32)
    for at in range(start, end, BLOCK):
        d = at + tl.arange(0, BLOCK)
        wide = tl.load(rows + d[None, :], mask=here & (d < end)[None, :], other=0.0)
        narrow = tl.load(columns + d.to(tl.int64)[:, None] * f_d, mask=known & (d < end)[:, None], other=0.0)
        total = _dot(wide, narrow, total, PRECISION)
    tl.store(h + n.to(tl.int64)[:, None] * rank + r[None, :], total * rate, mask=here & known)


@triton.jit
def _sum_parts(h, n, r, here, known, h_s, rank, SUMMANDS: tl.constexpr):
    at = h + n.to(tl.int64)[:, None] * rank + r[None, :]
    total = tl.load(at, mask=here & known, other=0.0)
    for s in range(1, SUMMANDS):
        total += tl.load(at + s * h_s, mask=here & known, other=0.0)
    return total


@triton.jit
def _expand(
    y, h, factor, scale, bias, ranks, bounds, out,
    y_n, h_s, f_k, f_r, f_d, width, rank,
    NUM_SLOTS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, FEW: tl.constexpr,
    BLOCK: tl.constexpr, LOOPS: tl.constexpr, SUMMANDS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    slot, first, stop = _tile(bounds, tl.program_id(0), NUM_SLOTS, TOKENS, GROUPS)
    if slot > NUM_SLOTS:
        return
    has_slot = (slot >= 0) & (slot < NUM_SLOTS)
    row, own = tl.where(has_slot, slot, 0).to(tl.int64), tl.load(ranks + slot, mask=has_slot, other=0)
    factor += row * f_k
    scale += row * width
    if own <= FEW:
        _expand_tiles(
            y, h, factor, scale, bias, out, has_slot, own, first, stop, y_n, h_s, f_r, f_d, width, rank,
            TOKENS, FEW, BLOCK, LOOPS, SUMMANDS, SCALED, BIASED, PRECISION,
        )  # fmt: skip
    else:
        _expand_tiles(
            y, h, factor, scale, bias, out, has_slot, own, first, stop, y_n, h_s, f_r, f_d, width, rank,
            TOKENS, RANKS, BLOCK, LOOPS, SUMMANDS, SCALED, BIASED, PRECISION,
        )  # fmt: skip


@triton.jit
def _expand_tiles(
    y, h, factor, scale, bias, out, has_slot, own, first, stop, y_n, h_s, f_r, f_d, width, rank,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, LOOPS: tl.constexpr,
    SUMMANDS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, r = first + tl.arange(0, TOKENS), tl.arange(0, RANKS)
    here = (n < stop)[:, None]
    left = _sum_parts(h, n, r, here, (r < own)[None, :], h_s, rank, SUMMANDS).to(factor.dtype.element_ty)
    begin = tl.program_id(1) * LOOPS
    for block in range(begin, min(begin + LOOPS, tl.cdiv(width, BLOCK))):
        d = block * BLOCK + tl.arange(0, BLOCK)
        inside = (d < width)[None, :]
        columns = factor + d.to(tl.int64)[None, :] * f_d
        right = tl.load(columns + r[:, None] * f_r, mask=(r < own)[:, None] & inside, other=0.0)
        total = _dot(left, right, tl.zeros((TOKENS, BLOCK), tl.float32), PRECISION)
        for more in range(RANKS, own, RANKS):
            q = more + tl.arange(0, RANKS)
            known = q < own
            again = _sum_parts(h, n, q, here, known[None, :], h_s, rank, SUMMANDS).to(factor.dtype.element_ty)
            right = tl.load(columns + q[:, None] * f_r, mask=known[:, None] & inside, other=0.0)
            total = _dot(again, right, total, PRECISION)
        y_at = y + n.to(tl.int64)[:, None] * y_n + d[None, :]
        if SCALED:
            total += tl.load(y_at, mask=here & inside, other=0.0).to(tl.float32)
            tl.store(y_at, total.to(y.dtype.element_ty), mask=here & inside)
            if has_slot:
                total *= tl.load(scale + d, mask=d < width, other=1.0)[None, :]
        if BIASED:
            total += tl.load(bias + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
        out_at = y_at if not SCALED else out + n.to(tl.int64)[:, None] * width + d[None, :]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=here & inside)


@triton.jit
def _scale_span(dy, y, out, start, stop, dy_n, d, width, scale, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, TOKENS):
        n = first + tl.arange(0, TOKENS)
        here = (n < stop)[:, None] & (d < width)[None, :]
        at = n.to(tl.int64)[:, None] * width + d[None, :]
        slope = tl.load(dy + n.to(tl.int64)[:, None] * dy_n + d[None, :], mask=here, other=0.0).to(tl.float32)
        total += tl.sum(slope * tl.load(y + at, mask=here, other=0.0).to(tl.float32), 0)
        tl.store(out + at, (slope * scale[None, :]).to(out.dtype.element_ty), mask=here)
    return total


@triton.jit
def _scale_backward(
    dy, y, scale, weight, bounds, out, sums, dy_n, width,
    NUM_SLOTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot, d = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if slot < NUM_SLOTS:
        at = slot.to(tl.int64) * width + d
        rate = tl.load(scale + at, mask=d < width, other=1.0)
        start, stop = tl.load(bounds + slot + 1), tl.load(bounds + slot + 2)
        total = _scale_span(dy, y, out, start, stop, dy_n, d, width, rate, TOKENS, BLOCK)
        tl.store(sums + at, total * tl.load(weight + at, mask=d < width, other=0.0), mask=d < width)
    else:  # nobody's tokens
        one = tl.full((BLOCK,), 1.0, tl.float32)
        for group in range(0, NUM_SLOTS + 2, NUM_SLOTS + 1):
            start, stop = tl.load(bounds + group), tl.load(bounds + group + 1)
            _scale_span(dy, y, out, start, stop, dy_n, d, width, one, TOKENS, BLOCK)


@triton.jit
def _gradient(
    h, x, gradient, ranks, bounds, slot, block,
    h_s, x_n, g_k, g_r, g_d, width, rank,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr, SUMMANDS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    own, begin, d = tl.load(ranks + slot), tl.program_id(2) * RANKS, block * BLOCK + tl.arange(0, BLOCK)
    gradient += slot.to(tl.int64) * g_k
    r = begin + tl.arange(0, RANKS)
    computed = 0  # what lies beyond is zero
    if (begin == 0) & (own <= FEW):
        computed = FEW
        _gradient_tile(
            h, x, gradient, bounds, slot, begin, own, d, h_s, x_n, g_r, g_d, width, rank,
            TOKENS, FEW, BLOCK, SUMMANDS, PRECISION,
        )  # fmt: skip
    elif begin < own:
        computed = begin + RANKS
        _gradient_tile(
            h, x, gradient, bounds, slot, begin, own, d, h_s, x_n, g_r, g_d, width, rank,
            TOKENS, RANKS, BLOCK, SUMMANDS, PRECISION,
        )  # fmt: skip
    if computed < min(begin + RANKS, rank):
        at = gradient + r.to(tl.int64)[:, None] * g_r + d.to(tl.int64)[None, :] * g_d
        beyond = ((r >= computed) & (r < rank))[:, None] & (d < width)[None, :]
        tl.store(at, tl.zeros((RANKS, BLOCK), tl.float32), mask=beyond)


@triton.jit
def _gradient_tile(
    h, x, gradient, bounds, slot, begin, own, d, h_s, x_n, g_r, g_d, width, rank,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, SUMMANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r = begin + tl.arange(0, RANKS)
    start, stop = tl.load(bounds + slot + 1), tl.load(bounds + slot + 2)
    total = tl.zeros((RANKS, BLOCK), tl.float32)
    for first in range(start, stop, TOKENS):
        n = first + tl.arange(0, TOKENS)
        here = (n < stop)[:, None]
        wide = tl.load(x + n.to(tl.int64)[:, None] * x_n + d[None, :], mask=here & (d < width)[None, :], other=0.0)
        narrow = _sum_parts(h, n, r, here, (r < own)[None, :], h_s, rank, SUMMANDS)
        total = _dot(tl.trans(narrow.to(wide.dtype)), wide, total, PRECISION)
    at = gradient + r.to(tl.int64)[:, None] * g_r + d.to(tl.int64)[None, :] * g_d
    tl.store(at, total, mask=(r < rank)[:, None] & (d < width)[None, :])


@triton.jit
def _gradients(
    dh, x, da, h, dy, db, ranks, bounds, dh_s, x_n, num_in, h_s, dy_n, num_out, rank,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr,
    OF_A: tl.constexpr, OF_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slot, block, blocks_of_a = tl.program_id(0), tl.program_id(1), tl.cdiv(num_in, BLOCK)
    if block < blocks_of_a:
        _gradient(
            dh, x, da, ranks, bounds, slot, block, dh_s, x_n, rank * num_in, num_in, 1, num_in, rank,
            TOKENS, RANKS, FEW, BLOCK, OF_A, PRECISION,
        )  # fmt: skip
    else:
        _gradient(
            h, dy, db, ranks, bounds, slot, block - blocks_of_a, h_s, dy_n, rank * num_out, 1, rank, num_out, rank,
            TOKENS, RANKS, FEW, BLOCK, OF_B, PRECISION,
        )  # fmt: skip


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["salt", "width"])
def _dropout(
    x, seed, rate, salt, bounds, out, x_n, width,
    NUM_SLOTS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot, first, stop = _tile(bounds, tl.program_id(0), NUM_SLOTS, TOKENS, GROUPS)
    if slot > NUM_SLOTS:
        return
    n, d = first + tl.arange(0, TOKENS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = (n < stop)[:, None] & (d < width)[None, :]
    value = tl.load(x + n.to(tl.int64)[:, None] * x_n + d[None, :], mask=here, other=0.0).to(tl.float32)
    if (slot >= 0) & (slot < NUM_SLOTS):
        key = _mix(tl.load(seed + slot).to(tl.uint32)) ^ _mix(salt.to(tl.uint32))
        place = (n - tl.load(bounds + slot + 1)).to(tl.uint32)[:, None] * width.to(tl.uint32) + d.to(tl.uint32)[None, :]
        drawn = (_mix(place ^ _mix(key)) >> 8).to(tl.float32) * 5.9604644775390625e-08
        probability = tl.load(rate + slot)
        value = tl.where(drawn >= probability, value / (1 - probability), 0.0)
    tl.store(out + n.to(tl.int64)[:, None] * width + d[None, :], value.to(out.dtype.element_ty), mask=here)


@triton.jit
def _dora_scale(
    across, gram, b, squares, scale, magnitude, is_dora, result, inverse,
    width, rank, across_o, b_k, b_o,
    NUM_RANKS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slot, o = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < width
    mixed, own = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    b_rows = b + slot.to(tl.int64) * b_k + o.to(tl.int64)[:, None] * b_o
    for i in range(NUM_RANKS):
        r = i * RANKS + tl.arange(0, RANKS)
        known = inside[:, None] & (r < rank)[None, :]
        left = tl.load(b_rows + r[None, :], mask=known, other=0.0).to(tl.float32)
        product = tl.load(across + o.to(tl.int64)[:, None] * across_o + slot * rank + r[None, :], mask=known, other=0.0)
        mixed += tl.sum(left * product, 1)
        for j in range(NUM_RANKS):
            q = j * RANKS + tl.arange(0, RANKS)
            at = gram + slot * rank * rank + r[:, None] * rank + q[None, :]
            square = tl.load(at, mask=(r < rank)[:, None] & (q < rank)[None, :], other=0.0)
            right = tl.load(b_rows + q[None, :], mask=inside[:, None] & (q < rank)[None, :], other=0.0).to(tl.float32)
            own += tl.sum(tl.dot(left, square, input_precision=PRECISION) * right, 1)
    s = tl.load(scale + slot)
    total = tl.load(squares + o, mask=inside, other=1.0) + 2 * s * mixed + s * s * own
    rate = tl.where(total > 0, tl.rsqrt(tl.where(total > 0, total, 1.0)), 1.0)
    at = slot.to(tl.int64) * width + o
    magnified = tl.load(is_dora + slot) != 0
    length = tl.load(magnitude + at, mask=inside, other=1.0)
    tl.store(result + at, tl.where(magnified, length * rate, 1.0), mask=inside)
    tl.store(inverse + at, tl.where(magnified, rate, 0.0), mask=inside)


@triton.jit
def _bounds(slots, bounds, tokens, NUM_SLOTS: tl.constexpr, SLOTS: tl.constexpr, STEPS: tl.constexpr):
    slot = tl.arange(0, SLOTS)
    low, high = tl.zeros((SLOTS,), tl.int32), tl.zeros((SLOTS,), tl.int32) + tokens
    for _ in range(STEPS):
        middle = (low + high) // 2
        is_open = low < high
        less = tl.load(slots + middle, mask=is_open, other=0) < slot
        low, high = tl.where(is_open & less, middle + 1, low), tl.where(is_open & ~less, middle, high)
    tl.store(bounds + 1 + slot, low, mask=slot <= NUM_SLOTS)
    tl.store(bounds, 0)
    tl.store(bounds + NUM_SLOTS + 2, tokens)


def ragged_bounds(slots_N: Tensor, num_slots: int) -> Tensor:
    bounds = torch.empty(num_slots + 3, dtype=torch.int32, device=slots_N.device)
    steps = max(len(slots_N), 1).bit_length()
    _bounds[(1,)](slots_N, bounds, len(slots_N), num_slots, triton.next_power_of_2(num_slots + 1), steps)
    return bounds


def ragged_shrink(x_ND: Tensor, factor_KRD: Tensor, scale_K: Tensor, rank_K: Tensor, bounds: Tensor) -> Tensor:
    (num_slots, rank, width), ranks, tokens = factor_KRD.shape, _ranks(factor_KRD.shape[1]), _tokens(x_ND, SHRINK)
    block = SHRINK.width if x_ND.element_size() == 2 else SHRINK.width // 2
    tiles, chunks, blocks = _num_tiles(x_ND, num_slots, tokens), triton.cdiv(rank, ranks), triton.cdiv(width, block)
    splits = _splits(blocks, tiles * chunks)
    h_SNR = torch.empty(splits, len(x_ND), rank, dtype=torch.float32, device=x_ND.device)
    _shrink[(tiles, splits, chunks)](
        x_ND, factor_KRD, scale_K, rank_K, bounds, h_SNR,
        x_ND.stride(0), *factor_KRD.stride(), h_SNR.stride(0), width, rank, triton.cdiv(blocks, splits) * block,
        num_slots, _groups(num_slots), tokens, ranks, min(ranks, FEW_RANKS), block, _precision(x_ND),
        num_warps=SHRINK.num_warps, num_stages=SHRINK.num_stages,
    )  # fmt: skip
    return h_SNR


def ragged_expand(h_SNR: Tensor, factor_KRD: Tensor, bias_D: Tensor | None, rank_K: Tensor, bounds: Tensor) -> Tensor:
    shape = h_SNR.shape[1], factor_KRD.shape[2]
    y_ND = torch.empty(shape, dtype=factor_KRD.dtype, device=h_SNR.device)
    _launch_expand(y_ND, h_SNR, factor_KRD, None, bias_D, y_ND, rank_K, bounds)
    return y_ND


def ragged_expand_scaled(
    y_NO: Tensor, h_SNR: Tensor, factor_KRO: Tensor, scale_KO: Tensor, bias_O: Tensor | None, rank_K: Tensor,
    bounds: Tensor,
) -> Tensor:  # fmt: skip
    out_NO = torch.empty(y_NO.shape, dtype=y_NO.dtype, device=y_NO.device)
    _launch_expand(y_NO, h_SNR, factor_KRO, scale_KO, bias_O, out_NO, rank_K, bounds)
    return out_NO


def _launch_expand(
    y_ND: Tensor, h_SNR: Tensor, factor_KRD: Tensor, scale_KD: Tensor | None, bias_D: Tensor | None, out_ND: Tensor,
    rank_K: Tensor, bounds: Tensor,
) -> None:  # fmt: skip
    (num_slots, rank, width), ranks, tokens = factor_KRD.shape, _ranks(factor_KRD.shape[1]), _tokens(y_ND, EXPAND)
    grid = _num_tiles(y_ND, num_slots, tokens), triton.cdiv(width, EXPAND.width * EXPAND.loops)
    _expand[grid](
        y_ND, h_SNR, factor_KRD, y_ND if scale_KD is None else scale_KD, y_ND if bias_D is None else bias_D, rank_K,
        bounds, out_ND, y_ND.stride(0), h_SNR.stride(0), *factor_KRD.stride(), width, rank,
        num_slots, _groups(num_slots), tokens, ranks, min(ranks, FEW_RANKS), EXPAND.width, EXPAND.loops,
        len(h_SNR), scale_KD is not None, bias_D is not None, _precision(factor_KRD),
        num_warps=EXPAND.num_warps, num_stages=EXPAND.num_stages,
    )  # fmt: skip


def ragged_scale_backward(
    dy_NO: Tensor, y_NO: Tensor, scale_KO: Tensor, weight_KO: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor]:
    (num_slots, width), sums_KO = scale_KO.shape, torch.empty_like(scale_KO)
    out_NO = torch.empty(dy_NO.shape, dtype=dy_NO.dtype, device=dy_NO.device)
    _scale_backward[(num_slots + 1, triton.cdiv(width, 64))](
        dy_NO, y_NO, scale_KO, weight_KO, bounds, out_NO, sums_KO, dy_NO.stride(0), width, num_slots, 32, 64
    )
    return out_NO, sums_KO


def ragged_gradients(
    dh_SNR: Tensor, x_NI: Tensor, h_SNR: Tensor, dy_NO: Tensor, rank_K: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor]:
    num_slots, rank, num_in, num_out = len(bounds) - 3, h_SNR.shape[2], x_NI.shape[1], dy_NO.shape[1]
    da_KRI = torch.empty(num_slots, rank, num_in, dtype=torch.float32, device=x_NI.device)
    db_KOR = torch.empty(num_slots, num_out, rank, dtype=torch.float32, device=x_NI.device)
    tokens, block, num_warps, num_stages, _ = GRADIENTS
    blocks, ranks = triton.cdiv(num_in, block) + triton.cdiv(num_out, block), _ranks(rank)
    _gradients[(num_slots, blocks, triton.cdiv(rank, ranks))](
        dh_SNR, x_NI, da_KRI, h_SNR, dy_NO, db_KOR, rank_K, bounds,
        dh_SNR.stride(0), x_NI.stride(0), num_in, h_SNR.stride(0), dy_NO.stride(0), num_out, rank,
        tokens, ranks, min(ranks, FEW_RANKS), block, len(dh_SNR), len(h_SNR), _precision(x_NI),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return da_KRI, db_KOR


def ragged_dropout(x_ND: Tensor, seed_K: Tensor, rate_K: Tensor, salt: int, bounds: Tensor) -> Tensor:
    num_slots, (num_tokens, width) = len(seed_K), x_ND.shape
    out_ND = torch.empty(num_tokens, width, dtype=x_ND.dtype, device=x_ND.device)
    grid = _num_tiles(x_ND, num_slots, 16), triton.cdiv(width, 256)
    _dropout[grid](
        x_ND, seed_K, rate_K, salt, bounds, out_ND, x_ND.stride(0), width, num_slots, _groups(num_slots), 16, 256
    )
    return out_ND


def dora_scale(
    weight_OI: Tensor, squares_O: Tensor, a_KRI: Tensor, b_KOR: Tensor, scale_K: Tensor, magnitude_KO: Tensor,
    is_dora_K: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (num_slots, width, rank), ranks = b_KOR.shape, _ranks(b_KOR.shape[2])
    across_OX, gram_KRR = _product(weight_OI, a_KRI.flatten(0, 1).T), _product(a_KRI, a_KRI.mT)
    result_KO, inverse_KO = torch.empty_like(magnitude_KO), torch.empty_like(magnitude_KO)
    _dora_scale[(num_slots, triton.cdiv(width, 64))](
        across_OX, gram_KRR, b_KOR, squares_O, scale_K, magnitude_KO, is_dora_K, result_KO, inverse_KO,
        width, rank, across_OX.stride(0), b_KOR.stride(0), b_KOR.stride(1), triton.cdiv(rank, ranks), ranks, 64,
        "ieee" if b_KOR.dtype == torch.float32 else "tf32x3",
    )  # fmt: skip
    return result_KO, inverse_KO


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product in fp32, of values of any dtype."""
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type == "cpu":  # in the interpreter
        return left.float() @ right.float()
    multiply = torch.bmm if left.dim() == 3 else torch.mm
    product: Tensor = multiply(left, right, out_dtype=torch.float32)
    return product


def _tokens(x_ND: Tensor, tile: Tile) -> int:
    return tile.tokens if len(x_ND) > FEW else FEW_TOKENS


def _num_tiles(x_ND: Tensor, num_slots: int, tokens: int) -> int:
    """Return the most tiles that the tokens of K slots and of nobody can have."""
    return triton.cdiv(len(x_ND), tokens) + num_slots + 1


def _splits(num_blocks: int, num_programs: int) -> int:
    """Return the parts of a sum that fill the GPU with programs: a power of two, so that few kernels are compiled."""
    most = min(PROGRAMS // num_programs, num_blocks // 4)
    return 1 << max(most.bit_length() - 1, 0)


def _groups(num_slots: int) -> int:
    return triton.next_power_of_2(num_slots + 2)


def _ranks(rank: int) -> int:
    return min(max(triton.next_power_of_2(rank), 16), RANKS)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"
