"""The compiled products of served adapters against `Factors.add_to`: within 1e-5, of results near 1."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from rankloom.banks import compiled
from rankloom.banks.compiled import KernelInput, KernelSites, build_addresses, gather_factors
from rankloom.banks.rounding import round_adapter
from rankloom.banks.served_adapter import Factors, ServedAdapter

SITE = "layer.q_proj"


def folded(rank: int, num_in: int, num_out: int, *, scaled: bool = False, shifted: bool = False) -> ServedAdapter:
    factors = Factors(
        torch.randn(rank, num_in) / num_in**0.5,
        torch.randn(rank, num_out) / rank**0.5,
        torch.rand(num_out) + 0.5 if scaled else None,
        torch.randn(num_out) if shifted else None,
    )
    return ServedAdapter({SITE: factors}, {}, {})


def add(y_NO: torch.Tensor, x_NI: torch.Tensor, adapters: list[ServedAdapter], stops: np.ndarray) -> None:
    """The compiled way, on the second of two linears."""
    table_SK6 = np.stack([build_addresses(adapter, ["another", SITE]) for adapter in adapters], axis=1)
    sites = KernelSites([(1, [1]), (x_NI.shape[1], [y_NO.shape[1]])])
    shares = KernelInput(adapters, table_SK6, np.stack([stops[:-1], stops[1:]], axis=1), sites)
    shares.add_to(y_NO, x_NI, 1)


def both(
    x_NI: torch.Tensor, y_NO: torch.Tensor, adapters: list[ServedAdapter], counts: list[int], num_base: int
) -> None:
    """Checks that both ways give the same; the first `num_base` tokens are nobody's, and so are the last two."""
    expected_NO, found_NO = y_NO.clone(), y_NO.clone()
    stops = np.cumsum([num_base, *counts])
    for adapter, start, stop in zip(adapters, stops, stops[1:], strict=False):
        if factors := adapter.linears.get(SITE):
            factors.add_to(expected_NO[start:stop], x_NI[start:stop])
    add(found_NO, x_NI, adapters, stops)
    torch.testing.assert_close(found_NO, expected_NO, atol=1e-5, rtol=1e-5, equal_nan=True)
    nobody = [*range(num_base), *range(int(stops[-1]), len(y_NO))]
    assert torch.equal(found_NO[nobody], y_NO[nobody])


@pytest.fixture(params=[1, 2, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test, on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 7, 8, 16, 33, 64])
@pytest.mark.parametrize(("num_in", "num_out"), [(1, 1), (7, 5), (64, 31), (577, 192)])
def test_they_are_what_the_plain_products_are(rank: int, num_in: int, num_out: int) -> None:
    torch.manual_seed(rank)
    chance = random.Random(rank)
    for _ in range(4):
        others = [1 + (rank + i) % 9 for i in range(3)]  # ranks differ from share to share
        adapters = [folded(r, num_in, num_out, scaled=r % 2 == 0, shifted=r % 3 == 0) for r in (rank, *others)]
        adapters[::2] = map(round_adapter, adapters[::2])
        adapters.insert(2, ServedAdapter({}, {}, {}))  # has nothing on this linear
        counts = [chance.choice([0, 1, 2, 3, 4, 5, 11, 20]) for _ in adapters]
        num_tokens = 3 + sum(counts) + 2
        both(torch.randn(num_tokens, num_in), torch.randn(num_tokens, num_out), adapters, counts, num_base=3)


def test_linears_that_read_one_input_are_one_call() -> None:
    widths, counts = {"q": 31, "k": 7, "v": 12}, [1, 6, 3]
    names = ["another", *widths]
    adapters = [  # the second one has no q
        ServedAdapter(
            {
                name: folded(rank, 40, width, scaled=name == "k", shifted=name == "v").linears[SITE]
                for name, width in list(widths.items())[skipped:]
            },
            {},
            {},
        )
        for rank, skipped in ((3, 0), (5, 1), (8, 0))
    ]
    x_NI, y_NO, stops = torch.randn(12, 40), torch.randn(12, 50), np.cumsum([1, *counts])
    expected_NO = y_NO.clone()
    for adapter, start, stop in zip(adapters, stops, stops[1:], strict=False):
        for name, part_NO in zip(widths, expected_NO.split([*widths.values()], -1), strict=True):
            if factors := adapter.linears.get(name):
                factors.add_to(part_NO[start:stop], x_NI[start:stop])
    table_SK6 = np.stack([build_addresses(adapter, names) for adapter in adapters], axis=1)
    sites = KernelSites([(1, [1]), (40, [*widths.values()])])
    KernelInput(adapters, table_SK6, np.stack([stops[:-1], stops[1:]], axis=1), sites).add_to(y_NO, x_NI, 1)
    torch.testing.assert_close(y_NO, expected_NO, atol=1e-5, rtol=1e-5)


def test_an_adapter_is_gathered_as_it_is() -> None:
    linears = {"fp32": folded(3, 7, 5), "integers": round_adapter(folded(3, 7, 5)), "another": folded(2, 4, 9)}
    own = {name: adapter.linears[SITE] for name, adapter in linears.items()}
    found = gather_factors(own)
    assert {name: factors.a_RI.dtype for name, factors in found.items()} == {
        "fp32": torch.float32, "integers": torch.int16, "another": torch.float32,
    }  # fmt: skip
    for name, factors in found.items():
        for one, other in zip(factors.list_tensors(), own[name].list_tensors(), strict=True):
            assert torch.equal(one, other)
    assert gather_factors({}) == {}


@pytest.mark.parametrize("count", [1, 4, 6])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_no_number_stays_with_its_adapter(bad: float, count: int) -> None:
    sick, well = folded(3, 8, 8), folded(5, 8, 8)
    sick.linears[SITE].a_RI[2, 1] = bad
    for adapters in ([sick, well], [well, sick]):
        at = slice(0, count) if adapters[0] is sick else slice(count, 2 * count)
        x_NI, y_NO = torch.randn(2 * count, 8), torch.zeros(2 * count, 8)
        add(y_NO, x_NI, adapters, np.array([0, count, 2 * count]))
        sick_NO = y_NO[at]
        assert not sick_NO.isfinite().any()
        y_NO[at] = 0
        assert y_NO.isfinite().all()


def test_calls_from_several_python_threads_do_not_mix() -> None:
    """As where an adapter is tried while rows decode; each call has results of its own, and computes them again."""
    adapters, counts = [folded(r, 96, 64) for r in (3, 8, 16)], [1, 5, 2]

    def often(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            x_NI, y_NO = torch.randn(13, 96, generator=generator), torch.randn(13, 64, generator=generator)
            both(x_NI, y_NO, adapters, counts, num_base=3)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(often, range(3)))


def test_another_openmp_than_libgomp_is_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(compiled, "load_kernel", compiled.load_kernel.__wrapped__)
    both(torch.randn(20, 96), torch.randn(20, 64), [folded(3, 96, 64), folded(8, 96, 64)], [7, 8], num_base=3)
