"""Rotary position embeddings of queries and keys, in one operation: forward and backward.

A head's halves are rotated against each other, as in Llama. The arithmetic is in fp32 and is rounded once.

Shapes: B rows, T positions, H heads of the queries, J heads of the keys, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankloom.kernels import op


@op()
def rotate(q_BHTE: Tensor, k_BJTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Return q and k rotated; `back`: the gradients of q and k, given those of the rotated.

    A result's positions come before its heads in memory, as in what a linear layer returns. cos and sin may have one
    row for all.
    """
    cos_B1TE, sin_B1TE = cos_BTE.float().unsqueeze(1), sin_BTE.float().unsqueeze(1)
    results = []
    for x in (q_BHTE, k_BJTE):
        first, second = x.float().chunk(2, -1)
        (cos_1, cos_2), (sin_1, sin_2) = cos_B1TE.chunk(2, -1), sin_B1TE.chunk(2, -1)
        if back:
            halves = first * cos_1 + second * sin_2, second * cos_2 - first * sin_1
        else:
            halves = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
        rotated_BTHE = torch.cat(halves, -1).to(x.dtype).transpose(1, 2).contiguous()
        results.append(rotated_BTHE.transpose(1, 2))
    return results[0], results[1]


def rotary(q_BHTE: Tensor, k_BJTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k rotated by their positions' angles."""
    if not (torch.is_grad_enabled() and (q_BHTE.requires_grad or k_BJTE.requires_grad)):
        return rotate(q_BHTE, k_BJTE, cos_BTE, sin_BTE, False)
    both: tuple[Tensor, Tensor] = _Rotary.apply(q_BHTE, k_BJTE, cos_BTE, sin_BTE)
    return both


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rotate(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *rotate(dq, dk, cos, sin, True), None, None
