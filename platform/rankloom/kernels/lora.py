"""LoRA and DoRA of many adapters in two launches: y becomes factor · (y + x A B) + shift, each token with its adapter.

The adapters of a linear are rows of one table: one of rank r has r adjacent rows of A and of B, and a row each for its
factor and its shift. Row 0 of A and B is zero and belongs to no adapter. Linears that read the same input are *parts*
of one call. Tokens come in blocks: a block's tokens are adjacent and have one slot; slot -1 leaves them alone. All of
this is data on the device, so that a captured CUDA graph holds for any adapters.

`lora_shrink` reads x alone, so it may run beside the base's product. Sums, factors and shifts are in fp32.

Shapes: N tokens, G blocks, K slots, P parts, I in, O out of all parts, X rows of A and B, V rows of factors and shifts,
S splits of I, R the largest rank of an adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankloom.kernels import op

FIRST, RANK, FACTOR, SHIFT = range(4)
"""Columns of `slots_PK4`: the first row of A and B, their number, and the rows of factor and shift (-1: none)."""


@op()
def lora_shrink(
    x_NI: Tensor,
    a_PXI: Tensor,
    slots_PK4: Tensor,
    slot_G: Tensor,
    start_G1: Tensor,
    block: int,
    rank: int,
    splits: int,
) -> Tensor:
    """Return x A [S, N, P·R] in fp32, as S summands; beyond a token's own rank it is undefined.

    Args:
        slots_PK4: int32, see `FIRST`.
        slot_G: int32, the slot of each block.
        start_G1: int32, the first token of each block, and N.
        block: most tokens of a block with a slot: 1, or a power of two from 16.
        rank: R.
        splits: S.
    """
    token_GT = _list_tokens(slot_G, start_G1, block, len(x_NI))
    x_GTI = x_NI[token_GT.clamp(max=len(x_NI) - 1)].float()
    h_ND = x_NI.new_zeros(len(x_NI) + 1, len(a_PXI) * rank, dtype=torch.float32)
    for part, (a_XI, slots_K4) in enumerate(zip(a_PXI, slots_PK4, strict=True)):
        h_GTR = torch.bmm(x_GTI, _read_rows(a_XI, slots_K4, slot_G, rank).mT)
        h_ND[:, part * rank : (part + 1) * rank].index_put_((token_GT,), h_GTR)
    return torch.stack([h_ND[:-1], *[torch.zeros_like(h_ND[:-1])] * (splits - 1)])


@op(mutates=("y_NO",))
def lora_expand(
    y_NO: Tensor,
    h_SND: Tensor,
    b_XO: Tensor,
    vectors_VO: Tensor,
    slots_PK4: Tensor,
    slot_G: Tensor,
    start_G1: Tensor,
    block: int,
    widths: list[int],
) -> None:
    """Change the base's result in place.

    Args:
        h_SND: of `lora_shrink`; the other arguments are as there.
        vectors_VO: factors and shifts, in fp32.
        widths: outputs of each part.
    """
    token_GT = _list_tokens(slot_G, start_G1, block, len(y_NO))
    within_GT = token_GT.clamp(max=len(y_NO) - 1)
    h_GTD, y_GTO = h_SND.sum(0)[within_GT], y_NO[within_GT].float()
    rank, stop = h_SND.shape[-1] // len(widths), 0
    for part, (width, slots_K4) in enumerate(zip(widths, slots_PK4, strict=True)):
        start, stop = stop, stop + width
        h_GTR, y_GTW = h_GTD[..., part * rank : (part + 1) * rank], y_GTO[..., start:stop]
        y_GTW.baddbmm_(h_GTR, _read_rows(b_XO[:, start:stop], slots_K4, slot_G, rank))
        if len(vectors_VO):
            for column, neutral, combine in ((FACTOR, 1, y_GTW.mul_), (SHIFT, 0, y_GTW.add_)):
                vector_G = _read_column(slots_K4, slot_G, column, -1)
                given_GW = vectors_VO[vector_G.clamp(min=0), start:stop]
                combine(given_GW.masked_fill_(vector_G[:, None] < 0, neutral)[:, None])
    changed_NO = torch.cat([y_NO, y_NO[:1]])
    y_NO.copy_(changed_NO.index_put_((token_GT,), y_GTO.to(y_NO.dtype))[:-1])


def count_splits(num_in: int, num_blocks: int) -> int:
    """Return into how many summands `lora_shrink` is divided, so that few tokens too keep a GPU busy."""
    return max(1, min(-(-num_in // 1024), 256 // max(num_blocks, 1)))


def _list_tokens(slot_G: Tensor, start_G1: Tensor, block: int, num_tokens: int) -> Tensor:
    """Return [G, T]: the tokens of each block that has a slot; N, one past the last, in place of others."""
    token_GT = start_G1[:-1, None] + torch.arange(block, device=slot_G.device)
    own_GT = (token_GT < start_G1[1:, None]) & (slot_G >= 0)[:, None]
    return torch.where(own_GT, token_GT, num_tokens).long()


def _read_column(slots_K4: Tensor, slot_G: Tensor, column: int, neutral: int) -> Tensor:
    return torch.where(slot_G >= 0, slots_K4[slot_G.clamp(min=0), column], neutral)


def _read_rows(table_XD: Tensor, slots_K4: Tensor, slot_G: Tensor, rank: int) -> Tensor:
    """Return each block's rows [G, R, D] of A or B in fp32, zero beyond its adapter's rank."""
    rank_R = torch.arange(rank, device=slots_K4.device)
    used_GR = rank_R < _read_column(slots_K4, slot_G, RANK, 0)[:, None]
    row_GR = torch.where(used_GR, _read_column(slots_K4, slot_G, FIRST, 0)[:, None] + rank_R, 0)
    return table_XD.index_select(0, row_GR.flatten()).view(*row_GR.shape, -1).float()
