"""The kernels of the activation and of the rotation, in triton's interpreter, against their references."""

from __future__ import annotations

import pytest
import torch

from rankloom.kernels import activations, rotary
from rankloom.kernels.triton import activations as triton_activations
from rankloom.kernels.triton import rotary as triton_rotary

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_equal(left: object, right: object, dtype: torch.dtype) -> None:
    torch.testing.assert_close(left, right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("merged", [False, True])
def test_activation_kernels_equal_their_references(merged: bool, dtype: torch.dtype) -> None:
    dy, both = drawn(1, 3, 1100, dtype=dtype), drawn(1, 3, 2200, dtype=dtype, seed=1)
    gate, up = both.chunk(2, -1)  # rows of twice their width, as a merged linear returns them
    if not merged:
        gate, up = gate.contiguous(), up.contiguous()
    assert_equal(triton_activations.silu_mul_forward(gate, up), activations.silu_mul_forward(gate, up), dtype)
    assert_equal(triton_activations.silu_mul_backward(dy, gate, up), activations.silu_mul_backward(dy, gate, up), dtype)


@DTYPES
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("rows", "angles", "heads", "width"), [(1, 1, 4, 16), (2, 1, 3, 24), (2, 2, 18, 8)])
def test_rotation_kernel_equals_its_reference(
    rows: int, angles: int, heads: int, width: int, back: bool, dtype: torch.dtype
) -> None:
    q = drawn(rows, 5, heads, width, dtype=dtype).transpose(1, 2)
    k = drawn(rows, 5, 2, width, dtype=dtype, seed=1).transpose(1, 2)
    cos, sin = (drawn(angles, 5, width, dtype=dtype, seed=seed) for seed in (2, 3))
    found, expected = triton_rotary.rotate(q, k, cos, sin, back), rotary.rotate(q, k, cos, sin, back)
    assert_equal(found, expected, dtype)
    assert [x.stride() for x in found] == [x.stride() for x in expected]


def test_gradients_are_autograds() -> None:
    gate, up = (drawn(4, 24, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(
        lambda g, u: activations.silu_mul(g.float(), u.float()), (gate, up), eps=1e-3, atol=1e-3
    )
    q, k = (drawn(1, 2, 3, 8, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
    cos, sin = (drawn(1, 3, 8, dtype=torch.float32, seed=seed) for seed in (2, 3))
    assert torch.autograd.gradcheck(
        lambda q, k: rotary.rotary(q.float(), k.float(), cos, sin), (q, k), eps=1e-3, atol=1e-3
    )


def launch_all() -> None:
    """Launch each kernel on shapes of real models."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(1, 8, 1536, dtype=dtype)
        triton_activations.silu_mul_forward(x, x)
        triton_activations.silu_mul_backward(x, x, x)
        for heads, width in ((9, 64), (32, 128), (8, 80)):
            q = torch.empty(1, 8, heads, width, dtype=dtype).transpose(1, 2)
            cos = torch.empty(1, 8, width, dtype=dtype)
            for back in (False, True):
                triton_rotary.rotate(q, q[:, :3], cos, cos, back)
