"""The gated activation of `rankloom.kernels.activations`: one program a piece of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _forward(gate, up, y, gate_row, up_row, width, block: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    wide = tl.load(gate + row * gate_row + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, (wide * tl.sigmoid(wide) * factor).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dy, gate, up, dgate, dup, dy_row, gate_row, up_row, width, block: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    slope = tl.load(dy + row * dy_row + at, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(gate + row * gate_row + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
    rate = tl.sigmoid(wide)
    of_gate = slope * factor * rate * (1 + wide * (1 - rate))
    tl.store(dgate + row * width + at, of_gate.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * width + at, (slope * wide * rate).to(dup.dtype.element_ty), mask=inside)


def silu_mul_forward(gate: Tensor, up: Tensor) -> Tensor:
    gate_ND, up_ND = gate.flatten(0, -2), up.flatten(0, -2)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _forward[_grid(gate_ND)](gate_ND, up_ND, y, gate_ND.stride(0), up_ND.stride(0), gate.shape[-1], block=BLOCK)
    return y


def silu_mul_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    inputs = [x.flatten(0, -2) for x in (dy, gate, up)]
    dgate, dup = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
    rows = [x_ND.stride(0) for x_ND in inputs]
    _backward[_grid(inputs[0])](*inputs, dgate, dup, *rows, gate.shape[-1], block=BLOCK)
    return dgate, dup


def _grid(x_ND: Tensor) -> tuple[int, int]:
    assert x_ND.stride(1) == 1 or x_ND.shape[1] == 1
    return len(x_ND), triton.cdiv(x_ND.shape[1], BLOCK)
