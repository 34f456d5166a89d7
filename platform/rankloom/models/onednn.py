"""Products with a frozen weight on a CPU, by the faster of the two libraries that torch contains.

torch multiplies fp32 matrices with MKL, which on AMD's processors leaves AVX-512 unused. oneDNN, which torch keeps for
other types, uses it: about twice the throughput there, on unchanged weights. `use_onednn` gives a frozen model linears
that choose; they compute as before if oneDNN has no advantage or the weight trains. AMD's processors without AVX-512
gain on weights that `pack` has copied, for a few rows: 1.1 to 2.2 times MKL's throughput for 4 to 32.

Shapes: N rows, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIN_ELEMENTS = 2**16
"""Smallest weight for oneDNN, in elements; below, the overhead of a call dominates."""
PACKED_FOR = 16
"""Rows for which `pack` asks for a layout; with AVX-512 it was measured to be faster for 1 to 128."""
FEWEST = 4
"""Fewest rows for which the layout is faster without AVX-512."""


class FrozenLinear(nn.Linear):
    """nn.Linear that multiplies with oneDNN if that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        if not prefers_onednn(input, self.weight) or self.weight.requires_grad:
            return super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad:
            return apply_to_rows(_Linear, input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


def use_onednn(model: nn.Module) -> None:
    """Turn a model's plain linears into `FrozenLinear` if this machine gains by it."""
    if has_advantage():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = FrozenLinear


def pack(weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """Return F.linear, without a gradient, with a copy of the weight in oneDNN's layout; None: it does not take this.

    Without the copy, each call converts the layout, which for few rows is a good part of a product's time.
    """
    if not is_amd() or not _fit(weight_OI[:1], weight_OI):
        return None
    weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACKED_FOR)
    fewest = 1 if has_advantage() else FEWEST

    def forward(x: Tensor) -> Tensor:
        if x.numel() < fewest * x.shape[-1]:
            return F.linear(x, weight_OI, bias_O)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias_O, "none", [], "")
        return result

    return forward


@cache
def has_advantage() -> bool:
    """Return whether this is an AMD processor with AVX-512.

    Looked up instead of timed, because every process of a run must decide alike.
    """
    return is_amd() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def is_amd() -> bool:
    """Return whether this is an AMD processor and torch contains oneDNN."""
    cpuinfo = Path("/proc/cpuinfo")
    return torch.backends.mkldnn.is_available() and cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text()


def prefers_onednn(x: Tensor, weight_OI: Tensor) -> bool:
    """Return whether oneDNN is faster for a product of these two."""
    return has_advantage() and _fit(x, weight_OI)


def _fit(x: Tensor, weight_OI: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight_OI.dtype == torch.float32
        and x.numel() > 0
        and weight_OI.numel() >= MIN_ELEMENTS
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Compute F.linear, without a gradient."""
    if not prefers_onednn(x, weight_OI):
        return F.linear(x, weight_OI, bias_O)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
    return result


def multiply(y_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """Return y W, [N, I], without a gradient."""
    if not prefers_onednn(y_NO, weight_OI):
        return y_NO @ weight_OI
    result: Tensor = torch.ops.mkldnn._linear_pointwise(y_NO, weight_OI.T, None, "none", [], "")
    return result


def apply_to_rows(function: type[torch.autograd.Function], x: Tensor, *arguments: Tensor | None) -> Tensor:
    """Apply a product to x [..., I] as one matrix, and return [..., O].

    Of more dimensions oneDNN returns a view, and onto a view that a function made PEFT's layers can't add in place.
    """
    y_NO: Tensor = function.apply(x.reshape(-1, x.shape[-1]), *arguments)
    return y_NO.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """`linear` with a gradient to the input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return linear(x, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight_OI,) = ctx.saved_tensors
        return multiply(dy.contiguous(), weight_OI), None, None
