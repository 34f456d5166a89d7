"""Linears that bitsandbytes has quantised: their W, one product for several, and our own forward for int8 ones.

bitsandbytes' LLM.int8() rounds activations to int8 too, except in columns that hold an outlier. To find these it waits
for the device at each layer, and a column counts for all rows of a call. So no CUDA graph could hold it, and what a row
gets would depend on its neighbours, which are other members or other requests. Here activations keep their type, and
each product dequantises W, as for NF4; on a CPU it scales its result instead. This is more exact than LLM.int8(). On a
GPU the speed of int8 products of many tokens is lost; W takes memory for as long as its layer computes.

Shapes: N rows, I in, O out, B blocks of NF4 codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rankloom.models import onednn

INT8_MAX = 127.0
"""The code of a row's largest weight, which is the row's scale."""


def is_quantized(linear: nn.Module) -> bool:
    return is_nf4(linear) or is_int8(linear)


def is_nf4(linear: nn.Module) -> bool:
    return getattr(linear.weight, "quant_state", None) is not None


def is_int8(linear: nn.Module) -> bool:
    return hasattr(linear.weight, "SCB")


@torch.no_grad()
def read_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return W [O, I] of a linear layer of any kind, dequantised where it is quantised."""
    weight: Any = linear.weight
    if is_nf4(linear):
        from bitsandbytes.functional import dequantize_4bit  # slow to import, and most bases are plain

        nf4_OI: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return nf4_OI.to(dtype)
    if is_int8(linear):
        return dequantize_rows(weight.data, linear.get_buffer("row_scales"), dtype)
    dense_OI: Tensor = weight.T if isinstance(linear, Conv1D) else weight
    return dense_OI.to(dtype)


def dequantize_rows(codes_OI: Tensor, scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes · scale, which is rounded once."""
    if codes_OI.device.type == "cpu":  # where a product of two types takes forty times as long
        return codes_OI.to(torch.float32).mul_(scale_O1).to(dtype)
    return torch.mul(codes_OI, scale_O1, out=codes_OI.new_empty(codes_OI.shape, dtype=dtype))


def replace_int8_forwards(model: nn.Module) -> None:
    """Give the int8 layers of a model the forward of this module, and their scales as a buffer `row_scales` [O, 1]."""
    from bitsandbytes.nn import Linear8bitLt  # slow to import, and most bases are plain

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            # bitsandbytes' own forward, which moves them elsewhere, is never called
            scale_O: Any = module.weight.SCB
            module.register_buffer("row_scales", scale_O.float().view(-1, 1) / INT8_MAX, persistent=False)
            module.forward = MethodType(_forward, module)


def _forward(linear: Any, x: Tensor) -> Tensor:
    return multiply_int8(x, linear.weight.data, linear.row_scales, linear.bias)


def multiply_int8(x: Tensor, codes_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return x Wᵀ + bias, as F.linear, with a gradient to x alone."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    bias_O = None if bias_O is None else bias_O.to(dtype)
    return onednn.apply_to_rows(_Int8Linear, x.to(dtype), codes_OI, scale_O1, bias_O)


class _Int8Linear(torch.autograd.Function):
    """Keeps the codes alone for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, codes_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes_OI, scale_O1)
        if x_NI.device.type != "cpu":
            return F.linear(x_NI, dequantize_rows(codes_OI, scale_O1, x_NI.dtype), bias_O)
        # codes are exact in any dtype, and there are fewer results than weights to scale
        y_NO = onednn.linear(x_NI, codes_OI.to(x_NI.dtype), None) * scale_O1.T
        return (y_NO if bias_O is None else y_NO + bias_O).to(x_NI.dtype)

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        codes_OI, scale_O1 = ctx.saved_tensors
        if dy_NO.device.type != "cpu":
            return dy_NO @ dequantize_rows(codes_OI, scale_O1, dy_NO.dtype), None, None, None
        scaled_NO = (dy_NO * scale_O1.T).to(dy_NO.dtype)
        return onednn.multiply(scaled_NO, codes_OI.to(dy_NO.dtype)), None, None, None


def merge_quantized(linears: Sequence[Any], bias_O: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """Return the product of several linears side by side, whose codes and scales become views of one tensor each.

    Each W stays as it is, to the bit. Scales of NF4 that are quantised themselves become fp32.

    Args:
        bias_O: that of all linears.

    Returns:
        None: they are not quantised alike.
    """
    if all(map(is_int8, linears)):
        return _merge_int8(linears, bias_O)
    if not all(map(is_nf4, linears)):
        return None
    states = [linear.weight.quant_state for linear in linears]
    if any(math.prod(state.shape) % state.blocksize for state in states):
        return None
    kinds = {
        (state.blocksize, state.quant_type, state.dtype, linear.weight.dtype, linear.compute_dtype)
        for state, linear in zip(states, linears, strict=True)
    }
    return _merge_nf4(linears, bias_O) if len(kinds) == 1 else None


def _merge_int8(linears: Sequence[Any], bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    codes_OI, codes = merge_tensors([linear.weight.data for linear in linears])
    scale_O1, scales = merge_tensors([linear.row_scales for linear in linears])
    for linear, own_OI, own_O1 in zip(linears, codes, scales, strict=True):
        linear.weight.data = linear.weight.CB = own_OI
        linear.row_scales = own_O1
    return lambda x: multiply_int8(x, codes_OI, scale_O1, bias_O)


def _merge_nf4(linears: Sequence[Any], bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    states = [linear.weight.quant_state for linear in linears]
    scales = [dequantize_blockwise(s.absmax, s.state2) + s.offset if s.nested else s.absmax for s in states]
    scale_B, own_scales = merge_tensors([scale.float() for scale in scales])
    codes, own_codes = merge_tensors([linear.weight.data for linear in linears])
    for linear, state, own, own_B in zip(linears, states, own_codes, own_scales, strict=True):
        linear.weight.data = own
        state.absmax, state.nested, state.state2, state.offset = own_B, False, None, None
    first, dtype = states[0], linears[0].compute_dtype
    shape = torch.Size((sum(state.shape[0] for state in states), first.shape[1]))
    whole = QuantState(scale_B, shape, first.code, first.blocksize, first.quant_type, first.dtype)

    def multiply(x: Tensor) -> Tensor:
        y: Tensor = matmul_4bit(x.to(dtype or x.dtype), codes, whole, bias=bias_O)
        return y.to(x.dtype)

    return multiply


def merge_tensors(tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Return tensors one below the other, as one tensor, and its parts."""
    merged = torch.cat([*tensors])
    return merged, merged.split([len(tensor) for tensor in tensors])
