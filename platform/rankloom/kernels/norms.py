"""RMS norms over the last dimension, alone and of a sum: forward and backward for a frozen weight.

All arithmetic is in fp32 and is rounded once, at the end, as in `torch.nn.functional.rms_norm`.

Shapes: N rows (all dimensions but the last), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankloom.kernels import op


@op()
def rms_norm_forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return weight · x / rms(x) [..., D] in x's dtype, and 1 / rms(x) [N] in fp32."""
    inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x.float() * inverse * weight_D).to(x.dtype), inverse.flatten()


@op()
def add_rms_norm_forward(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm of x + residual, 1 / rms [N], and the sum, which is rounded before the norm."""
    total = x + residual
    inverse = torch.rsqrt(total.float().square().mean(-1, keepdim=True) + eps)
    return (total.float() * inverse * weight_D).to(x.dtype), inverse.flatten(), total


@op()
def rms_norm_backward(dy: Tensor, x: Tensor, weight_D: Tensor, inverse_N: Tensor, dx_onto: Tensor | None) -> Tensor:
    """Return the gradient of x, plus `dx_onto`: the gradient that reaches x by other ways."""
    inverse = inverse_N.view(*x.shape[:-1], 1)
    normed = x.float() * inverse
    scaled = dy.float() * weight_D
    dx = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return (dx if dx_onto is None else dx + dx_onto.float()).to(x.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return weight · x / sqrt(mean(x²) + eps) [..., D]; the weight gets no gradient."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rms_norm_forward(x, weight_D, eps)[0]
    normed: Tensor = _RmsNorm.apply(x, weight_D, eps)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and the sum; the weight gets no gradient."""
    if not (torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad)):
        normed, _, total = add_rms_norm_forward(x, residual, weight_D, eps)
        return normed, total
    both: tuple[Tensor, Tensor] = _AddRmsNorm.apply(x, residual, weight_D, eps)
    return both


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        normed, inverse_N = rms_norm_forward(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, inverse_N)
        return normed

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight_D, inverse_N = ctx.saved_tensors
        return rms_norm_backward(dy, x, weight_D, inverse_N, None), None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, inverse_N, total = add_rms_norm_forward(x, residual, weight_D, eps)
        ctx.save_for_backward(total, weight_D, inverse_N)
        return normed, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor, Tensor, None, None]:
        total, weight_D, inverse_N = ctx.saved_tensors
        dx = rms_norm_backward(dy, total, weight_D, inverse_N, dtotal)
        return dx, dx, None, None
