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

BLOCK = 64
"""Tokens that a program reads at once."""
PROGRAMS = 256
"""Programs that occupy a GPU; sequences are split where there are fewer."""
MOST_SPLITS = 16


@triton.jit
def _attend(
    query, key, value, keys, values, table, lengths, parts, sums, scale,
    query_row, query_head, key_row, key_head, value_row, value_head, page_stride, token_stride, head_stride, table_row,
    group: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, page: tl.constexpr, splits: tl.constexpr,
    block: tl.constexpr, block_g: tl.constexpr, block_e: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    earlier = (tl.load(lengths + row) - 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(earlier, splits), block) * block
    first = split * share
    last = tl.minimum(first + share, earlier)
    g, e = tl.arange(0, block_g), tl.arange(0, block_e)
    is_query = (g[:, None] < group) & (e[None, :] < width)
    of_query = query + row * query_row + (head * group + g[:, None]) * query_head + e[None, :]
    q = tl.load(of_query, mask=is_query, other=0.0)
    most = tl.full((block_g,), float("-inf"), tl.float32)
    total = tl.zeros((block_g,), tl.float32)
    sum_ge = tl.zeros((block_g, block_e), tl.float32)
    for at in range(first, last, block):
        t = at + tl.arange(0, block)
        here = tl.load(table + row * table_row + at // page).to(tl.int64) * page_stride
        here += (t % page)[:, None] * token_stride + head * head_stride + e[None, :]
        inside = (t[:, None] < last) & (e[None, :] < width)
        k = tl.load(keys + here, mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(t[None, :] < last, score, float("-inf"))
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
def _combine(parts, sums, out, width: tl.constexpr, splits: tl.constexpr, block_e: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    s, e = tl.arange(0, splits), tl.arange(0, block_e)
    part = place * splits + s
    most = tl.load(sums + part * 2)
    weight = tl.exp(most - tl.max(most, 0))
    total = tl.sum(weight * tl.load(sums + part * 2 + 1), 0)
    part_se = tl.load(parts + part[:, None] * width + e[None, :], mask=e[None, :] < width, other=0.0)
    found = tl.sum(weight[:, None] * part_se, 0) / total
    tl.store(out + place * width + e, found.to(out.dtype.element_ty), mask=e < width)


def decode_attention(
    query_RHE: Tensor, key_RhE: Tensor, value_RhE: Tensor, keys_SThE: Tensor, values_SThE: Tensor, table_RP: Tensor,
    length_R: Tensor, scale: float,
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
        *query_RHE.stride()[:2], *key_RhE.stride()[:2], *value_RhE.stride()[:2],
        *keys_SThE.stride()[:3], table_RP.stride(0),
        group=group, heads=num_heads, width=width, page=page, splits=splits,
        block=BLOCK, block_g=max(16, triton.next_power_of_2(group)), block_e=block_e, num_warps=4,
    )  # fmt: skip
    _combine[(num_rows * num_heads,)](parts, sums, out_RHE, width=width, splits=splits, block_e=block_e, num_warps=2)
    return out_RHE


def chunk_attention(
    query_NHE: Tensor, keys_SThE: Tensor, values_SThE: Tensor, table_RP: Tensor, length_R: Tensor, starts: Tensor,
    longest: int, scale: float,
) -> Tensor:  # fmt: skip
    width = query_NHE.shape[-1]
    if query_NHE.dtype not in (torch.bfloat16, torch.float16) or width % 8 or width > 256:  # as flash attention asks
        return mask_chunks(query_NHE, keys_SThE, values_SThE, table_RP, length_R, starts, longest, scale)
    num_tokens = table_RP.shape[1] * keys_SThE.shape[1]
    keys, values = (blocks[table_RP].flatten(0, 2) for blocks in (keys_SThE, values_SThE))
    starts_k = torch.arange(0, len(keys) + 1, num_tokens, dtype=torch.int32, device=query_NHE.device)
    found: Tensor = torch.ops.aten._flash_attention_forward(
        _with_unit_stride(query_NHE), keys, values, starts, starts_k, longest, num_tokens, 0.0, True, False,
        scale=scale, window_size_left=-1, window_size_right=0, seqused_k=length_R.int(),
    )[0]  # fmt: skip
    return found


def _num_splits(num_programs: int) -> int:
    """Return the splits of each sequence, a power of two."""
    return min(MOST_SPLITS, triton.next_power_of_2(max(1, PROGRAMS // num_programs)))


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
