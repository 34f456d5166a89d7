"""The Triton kernel of `cross_entropy.py`: one program a token, which reads its logits twice and writes them once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _onto(logits, targets, losses, stride, width, block: tl.constexpr):
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    target = tl.load(targets + token)
    true = tl.load(row + target).to(tl.float32)
    at = tl.arange(0, block)
    most = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, width, block):
        value = tl.load(row + start + at, mask=start + at < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, value)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a lane without a value so far
        total = total * tl.exp(most - base) + tl.exp(value - base)
        most = higher
    largest = tl.max(most, 0)
    log = largest + tl.log(tl.sum(total * tl.exp(most - largest), 0))
    tl.store(losses + token, log - true)
    for start in range(0, width, block):
        inside = start + at < width
        value = tl.load(row + start + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.exp(value - log) - (start + at == target).to(tl.float32)
        tl.store(row + start + at, value.to(logits.dtype.element_ty), mask=inside)


def cross_entropy_onto(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    losses_M = logits_MV.new_empty(len(logits_MV), dtype=torch.float32)
    width = logits_MV.shape[1]
    block = min(BLOCK, triton.next_power_of_2(width))
    _onto[(len(logits_MV),)](logits_MV, targets_M, losses_M, logits_MV.stride(0), width, block=block, num_warps=8)
    return losses_M
