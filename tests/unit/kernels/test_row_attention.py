"""The reference of row attention equals torch's SDPA, row by row, in result and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from rankloom.kernels.row_attention import row_attention

LENGTHS = [5, 1, 9, 3]


def drawn(num_tokens: int, num_heads: int, seed: int) -> torch.Tensor:
    values = torch.randn(num_tokens, num_heads, 8, generator=torch.Generator().manual_seed(seed))
    return values.requires_grad_()


@pytest.mark.parametrize("window", [0, 4])
def test_it_is_sdpa_within_each_row(window: int) -> None:
    ends = torch.tensor(LENGTHS).cumsum(0)
    behind = 4  # tokens of no row, one of them beyond the longest
    inputs = [drawn(int(ends[-1]) + behind, heads, seed) for seed, heads in enumerate((4, 2, 2))]
    starts = torch.cat([torch.zeros(1), ends, ends[-1:]]).to(torch.int32)  # and an empty row
    found = row_attention(*inputs, starts, longest=10, scale=0.3, window=window)
    expected = []
    for start, length in zip((ends - torch.tensor(LENGTHS)).tolist(), LENGTHS, strict=True):
        q, k, v = (x[start : start + length].transpose(0, 1) for x in inputs)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = (distance >= 0) & (distance < (window or length))
        row = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
        expected.append(row.transpose(0, 1))
    real = torch.cat(expected)
    torch.testing.assert_close(found[: len(real)], real, rtol=1e-5, atol=1e-5)
    weights = torch.randn(real.shape, generator=torch.Generator().manual_seed(9))
    gradients = [torch.autograd.grad((x[: len(real)] * weights).sum(), inputs) for x in (found, real)]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left[: len(real)], right[: len(real)], rtol=1e-5, atol=1e-5)


def test_values_of_one_row_never_reach_another() -> None:
    inputs = [drawn(sum(LENGTHS), heads, seed) for seed, heads in enumerate((4, 2, 2))]
    with torch.no_grad():
        for x in inputs:
            x[6:15] = float("nan")  # the third row
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    found = row_attention(*inputs, starts, longest=9, scale=1.0)
    for x in (found, *torch.autograd.grad(found.sum(), inputs)):
        assert x[6:15].isnan().all()
        assert not x[:6].isnan().any()
        assert not x[15:].isnan().any()
