"""Integers in place of an adapter's weights: how near they are, and what stays in fp32."""

from __future__ import annotations

import pytest
import torch

from rankloom.banks.rounding import round_adapter
from rankloom.banks.served_adapter import Factors, ServedAdapter


def random_adapter(rank: int = 3, num_in: int = 64, num_out: int = 31, num_linears: int = 1) -> ServedAdapter:
    torch.manual_seed(0)
    pairs = [(torch.randn(rank, num_in), torch.randn(rank, num_out)) for _ in range(num_linears)]
    return ServedAdapter({str(i): Factors(*pair, None, torch.randn(num_out)) for i, pair in enumerate(pairs)}, {}, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_take_half_of_the_memory_and_keep_the_product(dtype: torch.dtype) -> None:
    adapter, x_NI = random_adapter(16, 576, 1536), torch.randn(50, 576).to(dtype)
    rounded = round_adapter(adapter)
    assert rounded.linears["0"].a_RI.dtype is rounded.linears["0"].b_RO.dtype is torch.int16
    assert rounded.num_bytes < 0.55 * adapter.num_bytes
    expected_NO, found_NO = torch.zeros(2, 50, 1536)
    adapter.linears["0"].add_to(expected_NO, x_NI.float())
    rounded.linears["0"].add_to(found_NO, x_NI)
    assert (found_NO - expected_NO).norm() < 7e-5 * expected_NO.norm()


@pytest.mark.parametrize("bad", [1e4, 1e30, float("inf"), float("nan")])
def test_what_would_lose_the_rest_of_its_row_stays(bad: float) -> None:
    adapter = random_adapter(num_linears=4)
    adapter.linears["1"].b_RO[2, 7] = bad
    adapter.linears["2"].a_RI[:] = 1e-35  # its scale is not normal
    adapter.linears["3"].b_RO[:] = 0  # as new ones are
    rounded = round_adapter(adapter).linears
    assert [rounded[name] is adapter.linears[name] for name in rounded] == [False, True, True, False]
    x_NI, y_NO = torch.randn(4, 64), torch.zeros(4, 31)
    rounded["3"].add_to(y_NO, x_NI)
    assert torch.equal(y_NO, adapter.linears["3"].shift_O.expand(4, -1))
