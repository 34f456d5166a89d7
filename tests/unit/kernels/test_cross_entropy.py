"""The head's losses equal torch's cross-entropy; their kernel equals its reference."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from rankloom.kernels import cross_entropy
from rankloom.kernels.triton import cross_entropy as cross_entropy_triton


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [50, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_kernel_equals_its_reference(width: int, dtype: torch.dtype) -> None:
    targets = torch.tensor([3, width - 1, 0])
    logits = (4 * drawn(3, width, seed=0)).to(dtype)
    logits[1, 1:4] = float("-inf")
    found = []
    for onto in (cross_entropy.cross_entropy_onto, cross_entropy_triton.cross_entropy_onto):
        gradient = logits.clone()
        found.append((onto(gradient, targets), gradient))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("most", [2**27, 100])
def test_losses_and_gradients_are_torchs(biased: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", most)
    hidden, weight = drawn(7, 16, seed=0).requires_grad_(), drawn(40, 16, seed=1)
    bias, weights = drawn(40, seed=2) if biased else None, drawn(7, seed=3)
    targets = torch.randint(40, (7,), generator=torch.Generator().manual_seed(4))
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    found = cross_entropy.head_losses(hidden, weight, bias, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad((losses * weights).sum(), hidden)[0] for losses in (expected, found)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_one_tokens_nan_stays_its_own() -> None:
    hidden = drawn(3, 16, seed=0)
    hidden[1] = float("nan")
    hidden.requires_grad_()
    losses = cross_entropy.head_losses(hidden, drawn(40, 16, seed=1), None, torch.tensor([1, 2, 3]))
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


def launch_all() -> None:
    """Launch each kernel on shapes of real models."""
    targets = torch.zeros(8, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        for width in (49152, 128256, 151936):
            cross_entropy_triton.cross_entropy_onto(torch.empty(8, width, dtype=dtype), targets)
