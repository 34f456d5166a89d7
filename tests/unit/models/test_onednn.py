"""oneDNN's products are torch's own to rounding, with the gradient, and only for weights that don't train."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rankloom.models import onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def _advantage(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor."""
    monkeypatch.setattr(onednn, "is_amd", lambda: True)
    monkeypatch.setattr(onednn, "has_advantage", lambda: True)


def pair(*, bias: bool = True) -> tuple[nn.Linear, nn.Module]:
    """A frozen linear, and the same with oneDNN."""
    torch.manual_seed(0)
    plain = nn.Linear(320, 256, bias=bias).requires_grad_(False)
    model = nn.Sequential(copy.deepcopy(plain))
    onednn.use_onednn(model)
    assert type(model[0]) is onednn.FrozenLinear
    return plain, model[0]


@pytest.mark.parametrize("shape", [(7, 320), (2, 5, 320), (1, 320)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_result_and_the_gradient_are_torchs(shape: tuple[int, ...], bias: bool) -> None:
    plain, frozen = pair(bias=bias)
    x = torch.randn(shape)
    assert onednn.prefers_onednn(x, plain.weight)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = frozen(mine), plain(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for result in (found, expected):
        result += result.detach()  # as PEFT's AdaLoRA layers do
    weight = torch.randn_like(expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), plain(x), rtol=1e-5, atol=1e-5)


def test_rows_do_not_mix() -> None:
    plain, _ = pair()
    x = torch.randn(6, 320)
    broken = x.clone()
    broken[2] = float("nan")
    sound = [0, 1, 3, 4, 5]
    assert onednn.linear(x, plain.weight, None)[sound].equal(onednn.linear(broken, plain.weight, None)[sound])
    assert onednn.multiply(x[:, :256], plain.weight)[sound].equal(onednn.multiply(broken[:, :256], plain.weight)[sound])


def test_a_weight_that_trains_gets_its_gradient() -> None:
    plain, frozen = pair()
    x = torch.randn(3, 320)
    for module in (plain, frozen):
        module.requires_grad_(True)
        module(x).square().sum().backward()
    assert frozen.weight.grad is not None
    torch.testing.assert_close(frozen.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)


def test_what_it_does_not_suit_is_computed_as_before() -> None:
    plain, frozen = pair()
    x = torch.randn(3, 320)
    assert not onednn.prefers_onednn(x.bfloat16(), plain.weight.bfloat16())
    assert not onednn.prefers_onednn(x[:, :8], plain.weight[:8, :8])
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype == torch.bfloat16
        assert frozen(x).equal(plain(x))


@pytest.mark.parametrize("rows", [1, 7, 16, 200])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_a_packed_weight_gives_the_same(rows: int, bias: bool, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = pair(bias=bias)
    monkeypatch.setattr(onednn, "has_advantage", lambda: wide)  # without AVX-512 one row is MKL's
    forward, x = onednn.pack(plain.weight.detach(), plain.bias), torch.randn(1, rows, 320)
    assert forward is not None
    torch.testing.assert_close(forward(x), plain(x), rtol=1e-5, atol=1e-5)


def test_what_is_small_or_not_in_fp32_is_not_packed() -> None:
    assert onednn.pack(torch.zeros(8, 8), None) is None
    assert onednn.pack(torch.zeros(320, 320, dtype=torch.bfloat16), None) is None
