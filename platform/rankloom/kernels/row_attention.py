"""Causal attention within rows of different lengths that lie one after the other, without padding.

Shapes: N tokens, B rows, H query heads, G key heads, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankloom.kernels import op


@op()
def row_attention_forward(
    q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, starts_B1: Tensor, longest: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Return the attention's result [N, H, E], and the logarithm of each query's sum [H, N] in fp32.

    Args:
        starts_B1: int32, each row's first token, and the last row's end; tokens behind it have any result.
        longest: at least the longest row's tokens.
        window: number of tokens that a token sees, itself included; 0: all before it.
    """
    rows = _Rows(starts_B1, len(q_NHE), longest, window)
    q, k, v = rows.unpack(q_NHE), rows.unpack(k_NGE, q_NHE.shape[1]), rows.unpack(v_NGE, q_NHE.shape[1])
    scores = (torch.matmul(q, k.mT) * scale).masked_fill(~rows.seen_B1TT, float("-inf"))
    logs = scores.logsumexp(-1, keepdim=True)
    result = torch.matmul((scores - logs).exp(), v)
    return rows.repack(result).to(q_NHE.dtype), rows.repack(logs)[..., 0].T.contiguous()


@op(launches=5)
def row_attention_backward(
    dresult_NHE: Tensor,
    q_NHE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    result_NHE: Tensor,
    logs_HN: Tensor,
    starts_B1: Tensor,
    longest: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    rows, heads = _Rows(starts_B1, len(q_NHE), longest, window), q_NHE.shape[1]
    q, k, v = rows.unpack(q_NHE), rows.unpack(k_NGE, heads), rows.unpack(v_NGE, heads)
    dresult, result, logs = (rows.unpack(x) for x in (dresult_NHE, result_NHE, logs_HN.T[..., None]))
    weights = (torch.matmul(q, k.mT) * scale - logs).exp().masked_fill(~rows.seen_B1TT, 0)
    dweights = torch.matmul(dresult, v.mT) - (dresult * result).sum(-1, keepdim=True)
    dscores = (weights * dweights * scale).masked_fill(~rows.seen_B1TT, 0)
    parts = torch.matmul(dscores, k), torch.matmul(dscores.mT, q), torch.matmul(weights.mT, dresult)
    dq, dk, dv = (rows.repack(x) for x in parts)
    dk, dv = (x.view(len(x), k_NGE.shape[1], -1, x.shape[-1]).sum(2) for x in (dk, dv))
    return dq.to(q_NHE.dtype), dk.to(q_NHE.dtype), dv.to(q_NHE.dtype)


def row_attention(
    q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, starts_B1: Tensor, longest: int, scale: float, window: int = 0
) -> Tensor:
    """Return [N, H, E], as `row_attention_forward`, with gradients."""
    result_NHE: Tensor = _RowAttention.apply(q_NHE, k_NGE, v_NGE, starts_B1, longest, scale, window)
    return result_NHE


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *sizes: Any) -> Tensor:
        result, logs = row_attention_forward(q, k, v, starts, *sizes)
        ctx.save_for_backward(q, k, v, result, logs, starts)
        ctx.sizes = sizes
        return result

    @staticmethod
    def backward(ctx: Any, dresult: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, result, logs, starts = ctx.saved_tensors
        return (*row_attention_backward(dresult, q, k, v, result, logs, starts, *ctx.sizes), None, None, None, None)


class _Rows:
    """Rows as a padded batch. Padding repeats the row's own last token, so that one row's NaN can't reach another."""

    def __init__(self, starts_B1: Tensor, num_tokens: int, longest: int, window: int) -> None:
        t = torch.arange(longest, device=starts_B1.device)
        starts_B, stops_B = starts_B1[:-1, None], starts_B1[1:, None]
        self.tokens_BT = torch.minimum(starts_B + t, stops_B - 1).clamp(min=0)
        at_N = torch.arange(num_tokens, device=starts_B1.device)
        self.row_N = (torch.searchsorted(starts_B1, at_N, right=True) - 1).clamp(max=len(starts_B1) - 2)
        self.place_N = (at_N - starts_B1[self.row_N]).clamp(max=longest - 1)
        distance = t[:, None] - t
        seen_TT = (distance >= 0) & (distance < window) if window else distance >= 0
        is_padding_BT = t >= stops_B - starts_B
        self.seen_B1TT = (seen_TT & (~is_padding_BT[..., None] | (distance == 0)))[:, None]

    def unpack(self, x_NGE: Tensor, num_heads: int | None = None) -> Tensor:
        """Return [B, H, T, E] in fp32, each of G heads for the query heads that share it."""
        found = x_NGE[self.tokens_BT].transpose(1, 2).float()
        return found if num_heads is None else found.repeat_interleave(num_heads // found.shape[1], 1)

    def repack(self, x_BHTE: Tensor) -> Tensor:
        return x_BHTE.transpose(1, 2)[self.row_N, self.place_N]
