"""The ops of `rankloom.kernels.attention`.

Decoding has one program for a sequence, a key head and a split of the sequence's tokens; all query heads of the key
head share what it reads. A second kernel adds the splits up. Chunks use torch's flash attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankloom.kernels.attention import mask_chunks

LOWEST = tl.constexpr(-1e30)
"""Below every score, and finite, so that a block of which nothing is seen adds nothing."""
BLOCK = 64
"""Tokens that a program reads at once."""
PROGRAMS = 256
"""Programs that occupy a GPU; sequences are split where there are fewer."""
MOST_SPLITS = 16
UNLIMITED = 1 << 30
"""A window that holds every token."""


@triton.jit
def _attend(
    query, key, value, keys, values, table, lengths, parts, sums, scale, window, softcap,
    query_row, query_head, key_row, key_head, value_row, value_head, page_stride, token_stride, head_stride, table_row,
    group: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, page: tl.constexpr, splits: tl.constexpr,
    capped: tl.constexpr, block: tl.constexpr, block_g: tl.constexpr, block_e: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    earlier = (tl.load(lengths + row) - 1).to(tl.int32)
    seen = tl.maximum(earlier + 1 - window, 0)  # the first token that is
    begin = seen // block * block
    share = tl.cdiv(tl.cdiv(earlier - begin, splits), block) * block
    first = begin + split * share
    last = tl.minimum(first + share, earlier)
    g, e = tl.arange(0, block_g), tl.arange(0, block_e)
    is_query = (g[:, None] < group) & (e[None, :] < width)
    of_query = query + row * query_row + (head * group + g[:, None]) * query_head + e[None, :]
    q = tl.load(of_query, mask=is_query, other=0.0)
    most = tl.full((block_g,), LOWEST, tl.float32)
    total = tl.zeros((block_g,), tl.float32)
    sum_ge = tl.zeros((block_g, block_e), tl.float32)
    for at in range(first, last, block):
        t = at + tl.arange(0, block)
        here = tl.load(table + row * table_row + at // page).to(tl.int64) * page_stride
        here += (t % page)[:, None] * token_stride + head * head_stride + e[None, :]
        inside = (t[:, None] < last) & (e[None, :] < width)
        k = tl.load(keys + here, mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if capped:
            score = _cap(score, softcap)
        score = tl.where((t[None, :] >= seen) & (t[None, :] < last), score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        p = tl.exp(score - higher[:, None])
        decay = tl.exp(most - higher)
        v = tl.load(values + here, mask=inside, other=0.0)
        sum_ge = sum_ge * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * decay + tl.sum(p, 1)
        most = higher
    if split == 0:  # the new token
        k = tl.load(key + row * key_row + head * key_head + e, mask=e < width, other=0.0)
        v = tl.load(value + row * value_row + head * value_head + e, mask=e < width, other=0.0)
        here = tl.load(table + row * table_row + earlier // page).to(tl.int64) * page_stride
        here += (earlier % page) * token_stride + head * head_stride + e
        tl.store(keys + here, k, mask=e < width)
        tl.store(values + here, v, mask=e < width)
        score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
        if capped:
            score = _cap(score, softcap)
        higher = tl.maximum(most, score)
        p = tl.exp(score - higher)
        decay = tl.exp(most - higher)
        sum_ge = sum_ge * decay[:, None] + p[:, None] * v.to(tl.float32)[None, :]
        total = total * decay + p
        most = higher
    part = (row * heads + head * group + g) * splits + split
    tl.store(parts + part[:, None] * width + e[None, :], sum_ge, mask=is_query)
    tl.store(sums + part * 2, most, mask=g < group)
    tl.store(sums + part * 2 + 1, total, mask=g < group)


@triton.jit
def _cap(score, softcap):
    return softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)  # tanh


@triton.jit
def _combine(
    parts, sums, sinks, out,
    heads: tl.constexpr, width: tl.constexpr, splits: tl.constexpr, sunk: tl.constexpr, block_e: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    s, e = tl.arange(0, splits), tl.arange(0, block_e)
    part = place * splits + s
    most = tl.load(sums + part * 2)
    highest = tl.max(most, 0)
    weight = tl.exp(most - highest)
    total = tl.sum(weight * tl.load(sums + part * 2 + 1), 0)
    if sunk:
        total += tl.exp(tl.load(sinks + place % heads).to(tl.float32) - highest)
    part_se = tl.load(parts + part[:, None] * width + e[None, :], mask=e[None, :] < width, other=0.0)
    found = tl.sum(weight[:, None] * part_se, 0) / total
    tl.store(out + place * width + e, found.to(out.dtype.element_ty), mask=e < width)


def decode_attention(
    query_RHE: Tensor, key_RhE: Tensor, value_RhE: Tensor, keys_SThE: Tensor, values_SThE: Tensor, table_RP: Tensor,
    length_R: Tensor, scale: float, window: int = 0, softcap: float = 0.0, sinks_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    query_RHE, key_RhE, value_RhE = (_with_unit_stride(x) for x in (query_RHE, key_RhE, value_RhE))
    (num_rows, num_heads, width), (_, page, num_key_heads, _) = query_RHE.shape, keys_SThE.shape
    assert page % BLOCK == 0
    assert keys_SThE.stride() == values_SThE.stride()
    assert table_RP.stride(1) == length_R.stride(0) == 1
    splits = _num_splits(num_rows * num_key_heads)
    parts = query_RHE.new_empty(num_rows, num_heads, splits, width, dtype=torch.float32)
    sums = query_RHE.new_empty(num_rows, num_heads, splits, 2, dtype=torch.float32)
    out_RHE = query_RHE.new_empty(num_rows, num_heads, width)
    group = num_heads // num_key_heads
    block_e = max(16, triton.next_power_of_2(width))
    _attend[num_rows, num_key_heads, splits](
        query_RHE, key_RhE, value_RhE, keys_SThE, values_SThE, table_RP, length_R, parts, sums, scale,
        window or UNLIMITED, softcap, *query_RHE.stride()[:2], *key_RhE.stride()[:2], *value_RhE.stride()[:2],
        *keys_SThE.stride()[:3], table_RP.stride(0),
        group=group, heads=num_heads, width=width, page=page, splits=splits,
        capped=softcap != 0, block=BLOCK, block_g=max(16, triton.next_power_of_2(group)), block_e=block_e, num_warps=4,
    )  # fmt: skip
    _combine[(num_rows * num_heads,)](
        parts, sums, sums if sinks_H is None else sinks_H, out_RHE,
        heads=num_heads, width=width, splits=splits, sunk=sinks_H is not None, block_e=block_e, num_warps=2,
    )  # fmt: skip
    return out_RHE


def chunk_attention(
    query_NHE: Tensor, keys_SThE: Tensor, values_SThE: Tensor, table_RP: Tensor, length_R: Tensor, starts: Tensor,
    longest: int, scale: float, window: int = 0, softcap: float = 0.0, sinks_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    width = query_NHE.shape[-1]
    is_flash = query_NHE.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256
    if not is_flash or softcap:
        return mask_chunks(
            query_NHE, keys_SThE, values_SThE, table_RP, length_R, starts, longest, scale, window, softcap, sinks_H
        )
    num_tokens = table_RP.shape[1] * keys_SThE.shape[1]
    keys, values = (blocks[table_RP].flatten(0, 2) for blocks in (keys_SThE, values_SThE))
    starts_k = torch.arange(0, len(keys) + 1, num_tokens, dtype=torch.int32, device=query_NHE.device)
    found: Tensor
    found, sum_HN, *_ = torch.ops.aten._flash_attention_forward(
        _with_unit_stride(query_NHE), keys, values, starts, starts_k, longest, num_tokens, 0.0, True, False,
        scale=scale, window_size_left=window - 1, window_size_right=0, seqused_k=length_R.int(),
    )  # fmt: skip
    if sinks_H is None:
        return found
    share_NH = torch.sigmoid(sum_HN.T - sinks_H.float())  # of the softmax that keys have
    return found * share_NH.to(found.dtype)[..., None]


def _num_splits(num_programs: int) -> int:
    """Return the splits of each sequence, a power of two."""
    return min(MOST_SPLITS, triton.next_power_of_2(max(1, PROGRAMS // num_programs)))


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
