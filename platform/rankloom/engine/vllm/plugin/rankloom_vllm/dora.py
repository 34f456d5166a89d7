"""DoRA's arithmetic: y = m / ||W + BA|| · (W + BA) x + b, with a factor for each output that is constant in serving.

Shapes: N tokens, I in, O out, R rank, S slots of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

COLUMNS = 512
"""Inputs whose weights are read at a time."""


def sum_squares(
    read_columns: Callable[[int, int], Tensor], pairs: Sequence[tuple[Tensor, Tensor]], num_inputs: int
) -> Tensor:
    """Return the sums of squares [O] of the rows of W + BA, in fp32.

    Args:
        read_columns: returns W[:, begin:end].
        pairs: A [R, I] and B [rows, R] of each part of the outputs, one part after the other.
    """
    total_O: Tensor | None = None
    for begin in range(0, num_inputs, COLUMNS):
        end = min(begin + COLUMNS, num_inputs)
        delta_OC = torch.cat([b_OR.float() @ a_RI[:, begin:end].float() for a_RI, b_OR in pairs])
        part_O = (read_columns(begin, end).to(delta_OC) + delta_OC).square_().sum(dim=1)
        total_O = part_O if total_O is None else total_O + part_O
    assert total_O is not None
    return total_O


def compute_factors(magnitudes_O: Tensor, squares_O: Tensor) -> Tensor:
    """Return m / ||W + BA|| in fp32; a row of zeros has norm 1, as its magnitude scales nothing."""
    norms_O = squares_O.sqrt()
    return magnitudes_O.float() / norms_O.masked_fill_(norms_O == 0, 1)


def scale_rows(y_NO: Tensor, slots_N: Tensor, factors_SO: Tensor, shifts_SO: Tensor | None) -> Tensor:
    """Return y with each row scaled by its slot's factors and shifted, rounded once.

    Args:
        slots_N: -1: without an adapter. Others than those there are belong to rows that are thrown away.
        factors_SO: [S + 1, O] in fp32; the last row is for rows without an adapter.
        shifts_SO: like them, None: no shift.
    """
    last = factors_SO.shape[0] - 1
    rows_N = torch.where((slots_N < 0) | (slots_N > last), last, slots_N)
    scaled_NO = y_NO * factors_SO[rows_N]
    if shifts_SO is not None:
        scaled_NO = scaled_NO + shifts_SO[rows_N]
    return scaled_NO.to(y_NO.dtype)
