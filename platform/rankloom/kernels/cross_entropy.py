"""Cross-entropy of a frozen head, without the logits of all tokens at once.

The logits of a chunk of tokens become their own gradient in place, so that neither they nor a copy in fp32 outlive
their chunk. As in Liger Kernel (Hsu et al., 2024, https://arxiv.org/abs/2410.10989), the gradient is computed in the
forward pass; the backward pass multiplies it by each token's own.

Shapes: M tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rankloom.kernels import op

MOST_LOGITS = 2**27
"""Logits of a chunk; 256 MB in bf16."""


@op(mutates=("logits_MV",))
def cross_entropy_onto(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Return [M], the cross-entropies in fp32; replace the logits by the gradient of their token's."""
    logits = logits_MV.float()
    logs_M1 = logits.logsumexp(-1, keepdim=True)
    losses_M1 = logs_M1 - logits.gather(-1, targets_M[:, None])
    gradient = (logits - logs_M1).exp()
    logits_MV.copy_(gradient.scatter_add(-1, targets_M[:, None], torch.full_like(logs_M1, -1)))
    return losses_M1[:, 0]


def head_losses(hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_M: Tensor) -> Tensor:
    """Return [M], the cross-entropies of a frozen head's logits, in fp32."""
    losses_M: Tensor = _HeadLosses.apply(hidden_MD, weight_VD, bias_V, targets_M)
    return losses_M


def head_logits(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rows_R: Tensor, choices_RC: Tensor
) -> Tensor:
    """Return [R, C]: the head's logits of some words at some tokens."""
    parts = [
        F.linear(hidden_MD[rows], weight_VD, bias_V).gather(1, choices)
        for rows, choices in zip(*(t.split(_chunk(weight_VD)) for t in (rows_R, choices_RC)), strict=True)
    ]
    return torch.cat(parts)


def _chunk(weight_VD: Tensor) -> int:
    return max(1, MOST_LOGITS // len(weight_VD))


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_M: Tensor) -> Tensor:
        dhidden_MD = torch.empty_like(hidden_MD) if ctx.needs_input_grad[0] else None
        losses, most = [], _chunk(weight_VD)
        for start in range(0, len(hidden_MD), most):
            part = slice(start, start + most)
            logits_MV = F.linear(hidden_MD[part], weight_VD, bias_V)
            losses.append(cross_entropy_onto(logits_MV, targets_M[part]))
            if dhidden_MD is not None:
                torch.mm(logits_MV, weight_VD, out=dhidden_MD[part])
        ctx.save_for_backward(dhidden_MD)
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, dlosses_M: Tensor) -> tuple[Tensor, None, None, None]:
        (dhidden_MD,) = ctx.saved_tensors
        return (dhidden_MD * dlosses_M[:, None]).to(dhidden_MD.dtype), None, None, None
