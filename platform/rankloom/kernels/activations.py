"""The gated activation of an MLP, silu(gate) · up: forward and backward.

The arithmetic is in fp32 and is rounded once.

Shapes: N rows (all dimensions but the last), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rankloom.kernels import op


@op()
def silu_mul_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up [..., D]; rows may have any stride."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


@op()
def silu_mul_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    wide, rate = gate.float(), torch.sigmoid(gate.float())
    dgate = dy.float() * up.float() * rate * (1 + wide * (1 - rate))
    return dgate.to(gate.dtype), (dy.float() * wide * rate).to(up.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up [..., D]."""
    if not (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)):
        return silu_mul_forward(gate, up)
    product: Tensor = _SiluMul.apply(gate, up)
    return product


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu_mul_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return silu_mul_backward(dy, gate, up)
