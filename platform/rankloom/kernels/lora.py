"""LoRA and DoRA of many adapters in two launches: y becomes factor · (y + x A B) + shift, each token with its adapter.

The adapters of a linear are rows of one table: one of rank r has r adjacent rows of A and of B, and a row each for its
factor and its shift. Linears that read the same input are *parts* of one call. Tokens come in blocks: a block's tokens
are adjacent and have one slot; slot -1 leaves them alone. All of this is data on the device, so that a captured CUDA
graph holds for any adapters.

`lora_shrink` reads x alone, so it may run beside the base's product. Sums, factors and shifts are in fp32.

Shapes: N tokens, G blocks, K slots, P parts, I in, O out of all parts, X rows of A and B, V rows of factors and shifts,
S splits of I, R the largest rank of an adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankloom.kernels import op

FIRST, RANK, FACTOR, SHIFT = range(4)
"""Columns of `slots_PK4`: the first row of A and B, their number, and the rows of factor and shift; -1: none."""


@op()
def lora_shrink(
    x_NI: Tensor,
    a_PXI: Tensor,
    slots_PK4: Tensor,
    slot_G: Tensor,
    start_G1: Tensor,
    block: int,  # noqa: ARG001
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
    slot_N = _slot_of_tokens(slot_G, start_G1, len(x_NI))
    h_SND = x_NI.new_zeros(splits, len(x_NI), len(a_PXI) * rank, dtype=torch.float32)
    for part in range(len(a_PXI)):
        row_NR, used_NR = _rows(slots_PK4[part], slot_N, rank)
        h_NR = torch.einsum("ni,nri->nr", x_NI.float(), a_PXI[part][row_NR].float())
        h_SND[0, :, part * rank : (part + 1) * rank] = torch.where(used_NR, h_NR, 0)
    return h_SND


@op(mutates=("y_NO",))
def lora_expand(
    y_NO: Tensor,
    h_SND: Tensor,
    b_XO: Tensor,
    vectors_VO: Tensor,
    slots_PK4: Tensor,
    slot_G: Tensor,
    start_G1: Tensor,
    block: int,  # noqa: ARG001
    widths: list[int],
) -> None:
    """Change the base's result in place.

    Args:
        h_SND: of `lora_shrink`; the other arguments are as there.
        vectors_VO: factors and shifts, in fp32.
        widths: outputs of each part.
    """
    slot_N = _slot_of_tokens(slot_G, start_G1, len(y_NO))
    rank, stop = h_SND.shape[-1] // len(widths), 0
    for part, width in enumerate(widths):
        start, stop = stop, stop + width
        row_NR, used_NR = _rows(slots_PK4[part], slot_N, rank)
        h_NR = torch.where(used_NR, h_SND[..., part * rank : (part + 1) * rank].sum(0), 0)
        b_NRO = torch.where(used_NR[..., None], b_XO[row_NR, start:stop].float(), 0)
        y_NW = y_NO[:, start:stop].float() + torch.einsum("nr,nro->no", h_NR, b_NRO)
        for column, neutral, combine in ((FACTOR, 1, torch.mul), (SHIFT, 0, torch.add)):
            vector_N1 = _column(slots_PK4[part], slot_N, column, -1)[:, None]
            given_NW = vectors_VO[vector_N1[:, 0].clamp(min=0), start:stop]
            y_NW = combine(y_NW, torch.where(vector_N1 >= 0, given_NW, neutral))
        y_NO[:, start:stop] = y_NW.to(y_NO.dtype)


def _slot_of_tokens(slot_G: Tensor, start_G1: Tensor, num_tokens: int) -> Tensor:
    token_N = torch.arange(num_tokens, device=slot_G.device, dtype=start_G1.dtype)
    return slot_G[torch.searchsorted(start_G1, token_N, right=True) - 1].long()


def _column(slots_K4: Tensor, slot_N: Tensor, column: int, neutral: int) -> Tensor:
    return torch.where(slot_N >= 0, slots_K4[slot_N.clamp(min=0), column], neutral)


def _rows(slots_K4: Tensor, slot_N: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return [N, R]: each token's rows of A and B, and which of these it has."""
    rank_R = torch.arange(rank, device=slots_K4.device)
    used_NR = rank_R < _column(slots_K4, slot_N, RANK, 0)[:, None]
    return torch.where(used_NR, _column(slots_K4, slot_N, FIRST, 0)[:, None] + rank_R, 0).long(), used_NR
