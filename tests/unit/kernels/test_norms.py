"""The norms' kernels, in triton's interpreter, against their references; and their gradients against autograd's."""

from __future__ import annotations

import pytest
import torch

from rankloom.kernels import norms
from rankloom.kernels.triton import norms as norms_triton

SHAPES = [(5, 64), (2, 3, 72), (1, 1)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_equal(left: object, right: object, dtype: torch.dtype) -> None:
    torch.testing.assert_close(left, right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_kernels_equal_their_references(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = drawn(shape, dtype, 0), drawn(shape, dtype, 1), drawn(shape[-1:], dtype, 2)
    assert_equal(norms_triton.rms_norm_forward(x, weight, 1e-5), norms.rms_norm_forward(x, weight, 1e-5), dtype)
    args = (x, residual, weight, 1e-5)
    assert_equal(norms_triton.add_rms_norm_forward(*args), norms.add_rms_norm_forward(*args), dtype)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_kernel_equals_its_reference(shape: tuple[int, ...], added: bool, dtype: torch.dtype) -> None:
    dy, x, weight = drawn(shape, dtype, 0), drawn(shape, dtype, 1), drawn(shape[-1:], dtype, 2)
    _, inverse = norms.rms_norm_forward(x, weight, 1e-5)
    args = (dy, x, weight, inverse, drawn(shape, dtype, 3) if added else None)
    assert_equal(norms_triton.rms_norm_backward(*args), norms.rms_norm_backward(*args), dtype)


def test_rms_norm_and_its_gradient_are_torchs() -> None:
    x, weight, dy = (drawn((4, 24), torch.float64, seed).float() for seed in range(3))
    weight = weight[0]
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    norms.rms_norm(mine, weight, 1e-5).backward(dy)
    torch.nn.functional.rms_norm(theirs, (24,), weight, 1e-5).backward(dy)
    assert mine.grad is not None
    assert_equal(mine.grad, theirs.grad, torch.float32)


def test_the_sum_and_its_norm_both_pass_their_gradients_on() -> None:
    x, residual, weight, dy, dtotal = (drawn((4, 24), torch.float32, seed) for seed in range(5))
    weight = weight[0]
    mine = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    theirs = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    torch.autograd.backward(list(norms.add_rms_norm(*mine, weight, 1e-5)), [dy, dtotal])
    total = theirs[0] + theirs[1]
    torch.autograd.backward([torch.nn.functional.rms_norm(total, (24,), weight, 1e-5), total], [dy, dtotal])
    for left, right in zip(mine, theirs, strict=True):
        assert_equal(left.grad, right.grad, torch.float32)


def launch_all() -> None:
    """Launch each kernel on shapes of real models."""
    for dtype, width in ((torch.bfloat16, 576), (torch.bfloat16, 4096), (torch.float32, 2048), (torch.bfloat16, 64)):
        x, weight = torch.empty(1, 8, width, dtype=dtype), torch.empty(width, dtype=dtype)
        _, inverse = norms_triton.rms_norm_forward(x, weight, 1e-5)
        norms_triton.add_rms_norm_forward(x, x, weight, 1e-5)
        norms_triton.rms_norm_backward(x, x, weight, inverse, None)
        norms_triton.rms_norm_backward(x, x, weight, inverse, x)
