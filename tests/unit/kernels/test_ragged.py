"""The ragged products' kernels, in triton's interpreter, against their references, for slots of every kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from rankloom.kernels import LAUNCHES, ragged
from rankloom.kernels.triton import ragged as kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NUM_SLOTS = 4
UNEVEN, NOBODYS = (2, 5, 3, 0, 40, 2), (3, 0, 0, 0, 0, 4)
"""Tokens of nobody, of four slots, and of nobody."""
COUNTS = pytest.mark.parametrize("counts", [UNEVEN, (0, 16, 0, 16, 1, 0), NOBODYS], ids=str)


def bounds_of(counts: tuple[int, ...]) -> Tensor:
    return ragged.ragged_bounds(torch.arange(-1, NUM_SLOTS + 1).repeat_interleave(torch.tensor(counts)), NUM_SLOTS)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_equal(left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    assert left.shape == right.shape
    assert left.dtype == right.dtype
    left, right = left.float(), right.float()
    assert (left - right).abs().max() <= TOLERANCE[dtype] * right.abs().max()


def ranks_of(rank: int) -> Tensor:
    return torch.tensor([rank, max(rank // 5, 1), rank, max(rank // 2, 1)], dtype=torch.int32)


def without_padding(h_SNR: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The sum of a product's summands, with zeros where it is undefined."""
    h_NR, ranks = h_SNR.sum(0), ranks_of(h_SNR.shape[-1])
    for slot, span in enumerate(torch.arange(sum(counts)).split(counts)[1:-1]):
        h_NR[span, int(ranks[slot]) :] = 0
    return h_NR


def of_slots(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    return x[..., counts[0] : sum(counts[:-1]), :]


@COUNTS
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_bounds(counts: tuple[int, ...], index: torch.dtype) -> None:
    slots = torch.arange(-1, NUM_SLOTS + 1).repeat_interleave(torch.tensor(counts)).to(index)
    expected = [0, *torch.tensor(counts).cumsum(0).tolist()]
    assert ragged.ragged_bounds(slots, NUM_SLOTS).tolist() == expected
    assert kernels.ragged_bounds(slots, NUM_SLOTS).tolist() == expected


@DTYPES
@pytest.mark.parametrize(
    ("counts", "width", "rank"), [(UNEVEN, 40, 4), (UNEVEN, 530, 24), ((0, 0, 0, 0, 9, 0), 40, 72), (NOBODYS, 40, 4)]
)
def test_products_equal_their_references(counts: tuple[int, ...], width: int, rank: int, dtype: torch.dtype) -> None:
    bounds, scale, ranks = bounds_of(counts), drawn(NUM_SLOTS, seed=3), ranks_of(rank)
    x, a = drawn(sum(counts), width, dtype=dtype), drawn(NUM_SLOTS, rank, width, dtype=dtype, seed=1)
    b = drawn(NUM_SLOTS, width, rank, dtype=dtype, seed=2)
    for factor in (a, b.mT):
        args = (x, factor, scale, ranks, bounds)
        found, h = kernels.ragged_shrink(*args), ragged.ragged_shrink(*args)
        if counts != (3, 0, 0, 0, 0, 4):
            assert_equal(of_slots(without_padding(found, counts), counts), of_slots(h[0], counts), dtype)
        for bias in (None, drawn(width, dtype=dtype, seed=4)):
            args = (h, factor, bias, ranks, bounds)
            assert_equal(kernels.ragged_expand(*args), ragged.ragged_expand(*args), dtype)
    args = (drawn(2, sum(counts), rank), x, h, drawn(sum(counts), 150, dtype=dtype, seed=5), ranks, bounds)
    for left, right in zip(kernels.ragged_gradients(*args), ragged.ragged_gradients(*args), strict=True):
        assert_equal(left, right, dtype)


@DTYPES
@COUNTS
@pytest.mark.parametrize("biased", [False, True])
def test_scaled_products_equal_their_references(counts: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
    width, rank, bounds, ranks = 200, 8, bounds_of(counts), ranks_of(8)
    h, b = drawn(2, sum(counts), rank), drawn(NUM_SLOTS, width, rank, dtype=dtype, seed=2)
    bias = drawn(width, dtype=dtype, seed=4) if biased else None
    scale, weight = 1 + 0.1 * drawn(NUM_SLOTS, width, seed=5), drawn(NUM_SLOTS, width, seed=6)
    mine, theirs = (drawn(sum(counts), width, dtype=dtype) for _ in range(2))
    found = kernels.ragged_expand_scaled(mine, h, b.mT, scale, bias, ranks, bounds)
    assert_equal(found, ragged.ragged_expand_scaled(theirs, h, b.mT, scale, bias, ranks, bounds), dtype)
    assert_equal(mine, theirs, dtype)
    args = (drawn(sum(counts), width, dtype=dtype, seed=7), mine, scale, weight, bounds)
    for left, right in zip(kernels.ragged_scale_backward(*args), ragged.ragged_scale_backward(*args), strict=True):
        assert (left.float() - right.float()).abs().max() <= TOLERANCE[dtype] * max(right.float().abs().max(), 1e-6)


@DTYPES
@pytest.mark.parametrize("rank", [8, 72])
def test_doras_scale_equals_its_reference(rank: int, dtype: torch.dtype) -> None:
    width, num_in = 70, 48
    weight = drawn(width, num_in, dtype=dtype)
    weight[3] = 0
    a, b = drawn(NUM_SLOTS, rank, num_in, dtype=dtype, seed=1), drawn(NUM_SLOTS, width, rank, dtype=dtype, seed=2)
    b[1] = 0
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    magnitude, scale = drawn(NUM_SLOTS, width, seed=3), torch.tensor([0.5, 1, 2, 0.1])
    args = (weight, squares, a, b, scale, magnitude, torch.tensor([True, True, False, True]))
    for found, expected in zip(kernels.dora_scale(*args), ragged.dora_scale(*args), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    whole = weight.float() + scale[:, None, None] * (b.float() @ a.float())
    torch.testing.assert_close(ragged.dora_scale(*args)[1][0], 1 / whole[0].norm(dim=1), rtol=1e-3, atol=1e-4)


def test_what_is_not_finite_stays_with_its_slot() -> None:
    counts = (1, 3, 20, 2, 4, 1)
    bounds, scale, ranks = bounds_of(counts), torch.ones(NUM_SLOTS), torch.full((NUM_SLOTS,), 8, dtype=torch.int32)
    x, a = drawn(sum(counts), 32), drawn(NUM_SLOTS, 8, 32, seed=1)
    a[1], x[4] = torch.inf, torch.nan
    h = kernels.ragged_shrink(x, a, scale, ranks, bounds).sum(0, keepdim=True)
    y = kernels.ragged_expand(h, a, None, ranks, bounds)
    gradient, _ = kernels.ragged_gradients(h, x, h, x, ranks, bounds)
    others = [*range(4), *range(24, sum(counts))]
    assert y[others].isfinite().all()
    assert not y[4:24].isfinite().any()
    assert gradient[[0, 2, 3]].isfinite().all()


@DTYPES
@COUNTS
def test_dropout_equals_its_reference(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    x, bounds = drawn(sum(counts), 300, dtype=dtype).abs() + 1, bounds_of(counts)
    seeds, rates = torch.tensor([7, 2**31 - 1, -5, 0], dtype=torch.int32), torch.tensor([0.5, 0.0, 0.1, 0.25])
    found, other = (kernels.ragged_dropout(x, seeds, rates, salt, bounds) for salt in (3, 4))
    assert_equal(found, ragged.ragged_dropout(x, seeds, rates, 3, bounds), dtype)
    tokens = dict(zip("-0123+", x.split(counts), strict=True)), dict(zip("-0123+", found.split(counts), strict=True))
    for kept in "-1+":
        assert torch.equal(tokens[0][kept], tokens[1][kept])
    for slot, rate in (("0", 0.5), ("3", 0.25)):
        if len(tokens[0][slot]) > 3:
            assert (tokens[1][slot] == 0).float().mean() == pytest.approx(rate, abs=0.06)
            assert not torch.equal(found == 0, other == 0)


def test_doras_scale_launches_as_often_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    run = GridExecutor.__call__

    def count(executor: GridExecutor, *args: object, **kwargs: object) -> object:
        launched.append(executor.fn.__name__)
        return run(executor, *args, **kwargs)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.name() in ("aten::mm", "aten::bmm"):
                launched.append(func.name())
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(GridExecutor, "__call__", count)
    a, b, vectors = drawn(NUM_SLOTS, 8, 32), drawn(NUM_SLOTS, 40, 8), drawn(NUM_SLOTS, 40)
    with Products():
        kernels.dora_scale(
            drawn(40, 32), vectors[0], a, b, vectors[:, 0], vectors, torch.ones(NUM_SLOTS, dtype=torch.bool)
        )
    assert sorted(launched) == ["_dora_scale", "aten::bmm", "aten::mm"]
    assert len(launched) == LAUNCHES["dora_scale"]


def test_ops_have_shapes_without_values() -> None:
    with FakeTensorMode():
        a, b = torch.empty(4, 8, 32, dtype=torch.bfloat16), torch.empty(4, 64, 8, dtype=torch.bfloat16)
        vectors, scale, x = torch.empty(4, 64), torch.empty(4), torch.empty(10, 32, dtype=torch.bfloat16)
        bounds = ragged.ragged_bounds(torch.empty(10, dtype=torch.int64), 4)
        ranks = torch.empty(4, dtype=torch.int32)
        h = ragged.ragged_shrink(x, a, scale, ranks, bounds)
        y = ragged.ragged_expand(h, b.mT, None, ranks, bounds)
        result = ragged.ragged_expand_scaled(y, h, b.mT, vectors, None, ranks, bounds)
        dy, dscale = ragged.ragged_scale_backward(result, y, vectors, vectors, bounds)
        da, db = ragged.ragged_gradients(h, x, h, dy, ranks, bounds)
        weight = torch.empty(64, 32, dtype=torch.bfloat16)
        factors = ragged.dora_scale(weight, vectors[0], a, b, scale, vectors, torch.zeros(4, dtype=torch.bool))
    shapes = [tuple(t.shape) for t in (bounds, y, result, dscale, da, db, *factors)]
    assert shapes == [(7,), (10, 64), (10, 64), (4, 64), (4, 8, 32), (4, 64, 8), (4, 64), (4, 64)]


def launch_all() -> None:
    """Launch each kernel on shapes of real models."""
    for dtype, tokens, num_slots, rank, width in (
        (torch.bfloat16, 4096, 16, 64, 2048),
        (torch.float32, 512, 4, 16, 576),
    ):
        x = torch.empty(tokens, width, dtype=dtype)
        a, b = torch.empty(num_slots, rank, width, dtype=dtype), torch.empty(num_slots, width, rank, dtype=dtype)
        scale, vectors = torch.empty(num_slots), torch.empty(num_slots, width)
        ranks = torch.empty(num_slots, dtype=torch.int32)
        bounds = kernels.ragged_bounds(torch.empty(tokens, dtype=torch.int64), num_slots)
        for factor in (a, b.mT):
            h = kernels.ragged_shrink(x, factor, scale, ranks, bounds)
            kernels.ragged_expand(h, factor, None, ranks, bounds)
            kernels.ragged_expand(h, factor, x[0], ranks, bounds)
        kernels.ragged_gradients(h, x, h, x, ranks, bounds)
        kernels.ragged_dropout(x, ranks, scale, 3, bounds)
        for bias in (None, x[0]):
            kernels.ragged_expand_scaled(x, h, b.mT, vectors, bias, ranks, bounds)
        kernels.ragged_scale_backward(x, x, vectors, vectors, bounds)
        weight = torch.empty(width, width, dtype=dtype)
        kernels.dora_scale(weight, vectors[0], a, b, scale, vectors, torch.zeros(num_slots, dtype=torch.bool))
