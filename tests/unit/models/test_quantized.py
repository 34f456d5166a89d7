"""Int8 layers compute with W at hand; merged layers keep each W to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankloom.banks.linear_groups import LinearGroup
from rankloom.config.model import Int8, ModelConfig, Nf4, Quantization
from rankloom.models import load_base
from rankloom.models.quantized import read_weight


def attention_of(folder: Path, quantization: Quantization) -> Any:
    base = load_base(ModelConfig(id=str(folder)), quantization, device=torch.device("cpu"))
    return base.model.model.layers[0].self_attn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_layer_is_a_product_with_its_weight(dtype: torch.dtype, tiny_model: Callable[..., Path]) -> None:
    linear = attention_of(tiny_model("qwen"), Int8()).q_proj
    weight_OI = read_weight(linear, dtype)
    codes_OI, scale_O = linear.weight.data, linear.weight.SCB
    torch.testing.assert_close(weight_OI, (codes_OI * (scale_O[:, None] / 127)).to(dtype), rtol=0, atol=0)
    x = torch.randn(2, 3, 4, linear.in_features, dtype=dtype, requires_grad=True)  # latents have four dimensions
    y = linear(x)
    exact = nn.functional.linear(x.float(), read_weight(linear, torch.float32), linear.bias)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (gradient,) = torch.autograd.grad(exact.square().sum(), x)
    for mine, wide in ((y, exact), (found, gradient)):
        assert mine.dtype == dtype
        assert (mine - wide).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-2) * wide.abs().max()


def test_an_outlier_in_one_row_leaves_the_others_alone(tiny_llama: Path) -> None:
    linear = attention_of(tiny_llama, Int8()).q_proj
    x_NI = torch.randn(5, linear.in_features)
    before_NO = linear(x_NI)
    x_NI[4, 7] = 1e3
    assert torch.equal(linear(x_NI)[:4], before_NO[:4])


@pytest.mark.parametrize("architecture", ["llama", "qwen"])
@pytest.mark.parametrize("quantization", [Int8(), Nf4(), Nf4(double=False)], ids=["int8", "nf4", "nf4-single"])
def test_merged_layers_keep_their_weights(
    quantization: Quantization, architecture: str, tiny_model: Callable[..., Path]
) -> None:
    attention = attention_of(tiny_model(architecture), quantization)
    linears = {name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")}
    x_NI = torch.randn(5, attention.q_proj.in_features)
    weights = [read_weight(linear, torch.float32) for linear in linears.values()]
    expected = torch.cat([linear(x_NI) for linear in linears.values()], -1)
    group = LinearGroup(linears)
    assert torch.equal(group.compute_base(x_NI), expected)
    for linear, weight_OI in zip(linears.values(), weights, strict=True):
        assert torch.equal(read_weight(linear, torch.float32), weight_OI)
    assert torch.equal(torch.cat([linear(x_NI) for linear in linears.values()], -1), expected)
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears.values()}) == 1


def test_layers_that_are_quantised_otherwise_are_put_side_by_side(tiny_llama: Path) -> None:
    linears = {
        "q_proj": attention_of(tiny_llama, Int8()).q_proj,
        "k_proj": attention_of(tiny_llama, Nf4()).k_proj,
    }
    x_NI = torch.randn(5, linears["q_proj"].in_features)
    expected = torch.cat([linear(x_NI) for linear in linears.values()], -1)
    assert torch.equal(LinearGroup(linears).compute_base(x_NI), expected)
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears.values()}) == 2
