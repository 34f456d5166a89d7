"""The products of served adapters in fp32 on a CPU, compiled by numba: one call a linear, whoever its tokens belong to.

A decoding row reads all of its adapter's weights for one token, so that memory is the limit. These kernels read the
weights where they lie, once and at their true rank, at nearly the rate of a plain sum over memory. With more tokens,
four share what is read. `Factors.add_to` is the plain reference.

Compiled once a machine, and kept in numba's cache.

Shapes: N tokens, S linears of the model, K adapters at work, I in, O out, R rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic
from torch import Tensor

from rankloom.adapters.folded import Factors, Folded

A, B, RANK, FACTOR, SHIFT = range(5)
"""What a table has for an adapter on a linear: addresses, 0 for what it lacks, and the rank."""
MATH = {"contract", "reassoc", "nsz"}
"""What the compiler may do to sums; nan and inf stay what they are."""


@dataclass(frozen=True)
class Shares:
    """The adapters of a forward and whose tokens are whose."""

    adapters: Sequence[Folded]
    """Holds what the table points to."""
    table_SK5: np.ndarray
    spans_K2: np.ndarray
    """First token, and the one after the last."""


def addresses(adapter: Folded, sites: Sequence[str]) -> np.ndarray:
    """[S, 5]: an adapter's part of a table, for the linears of these names."""
    return np.array([_addresses(adapter.linears.get(name)) for name in sites], dtype=np.int64).reshape(-1, 5)


def add_shares(y_NO: Tensor, x_NI: Tensor, shares: Shares, site: int) -> None:
    """Change the base's result in place as each share's `Factors.add_to` would; `site` is the linear's place in S."""
    assert x_NI.dtype == y_NO.dtype == torch.float32
    assert x_NI.is_contiguous()
    assert y_NO.is_contiguous()
    _add(x_NI.data_ptr(), y_NO.data_ptr(), x_NI.shape[1], y_NO.shape[1], shares.table_SK5, site, shares.spans_K2)


def compile_kernels() -> None:
    """Compile now what the first call would otherwise: seconds where numba has it not in its cache."""
    with contextlib.suppress(RuntimeError):  # nowhere to write: every process compiles
        _add.enable_caching()
    nothing = Shares((), np.empty((1, 0, 5), np.int64), np.empty((0, 2), np.int64))
    add_shares(torch.empty(0, 1), torch.empty(0, 1), nothing, 0)


def _addresses(factors: Factors | None) -> list[int]:
    if factors is None:
        return [0] * 5
    tensors = factors.a_RI, factors.b_RO, factors.factor_O, factors.shift_O
    assert all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in tensors)
    a, b, factor, shift = (0 if t is None else t.data_ptr() for t in tensors)
    return [a, b, factors.rank, factor, shift]


def _pointer(_typing: Any, _address: Any) -> Any:
    """For numba: how an address becomes a pointer to fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


_floats_at: Any = intrinsic(_pointer)

# The kernels below take tokens by ones and fours, and ranks by fours and twos: as many sums as there are registers.
# Where the rank is no multiple, the last rank is computed again, and `h` is zero beyond it.


@njit(fastmath=MATH, nogil=True)
def _add(x_at: int, y_at: int, num_in: int, num_out: int, table_SK5: np.ndarray, site: int, spans: np.ndarray) -> None:
    if len(spans) == 0:
        return
    num_tokens = spans[-1, 1]
    x, y = carray(_floats_at(x_at), (num_tokens, num_in)), carray(_floats_at(y_at), (num_tokens, num_out))
    table = table_SK5[site]
    h = np.zeros((4, table[:, RANK].max() + 3), np.float32)
    for k in range(len(spans)):
        start, stop, rank = spans[k, 0], spans[k, 1], table[k, RANK]
        if rank > 0:
            a = carray(_floats_at(table[k, A]), (rank, num_in))
            b = carray(_floats_at(table[k, B]), (rank, num_out))
            h[:, rank : rank + 3] = 0
            fours = start + (stop - start) // 4 * 4
            for t in range(start, fours, 4):
                _down_four(x[t : t + 4], a, h)
                _up_four(y[t : t + 4], b, h)
            for t in range(fours, stop):
                _down_one(x[t], a, h[0])
                _up_one(y[t], b, h[0])
        if table[k, FACTOR] != 0:
            factor = carray(_floats_at(table[k, FACTOR]), num_out)
            for t in range(start, stop):
                y[t] *= factor
        if table[k, SHIFT] != 0:
            shift = carray(_floats_at(table[k, SHIFT]), num_out)
            for t in range(start, stop):
                y[t] += shift


@njit(fastmath=MATH, nogil=True)
def _down_one(x: np.ndarray, a: np.ndarray, h: np.ndarray) -> None:
    last = len(a) - 1
    for r in range(0, len(a), 4):
        r1, r2, r3 = min(r + 1, last), min(r + 2, last), min(r + 3, last)
        a0, a1, a2, a3 = a[r], a[r1], a[r2], a[r3]
        h0 = h1 = h2 = h3 = np.float32(0)
        for i in range(len(x)):
            h0 += x[i] * a0[i]
            h1 += x[i] * a1[i]
            h2 += x[i] * a2[i]
            h3 += x[i] * a3[i]
        h[r3], h[r2], h[r1], h[r] = h3, h2, h1, h0


@njit(fastmath=MATH, nogil=True)
def _up_one(y: np.ndarray, b: np.ndarray, h: np.ndarray) -> None:
    last = len(b) - 1
    for r in range(0, len(b), 4):
        b0, b1, b2, b3 = b[r], b[min(r + 1, last)], b[min(r + 2, last)], b[min(r + 3, last)]
        h0, h1, h2, h3 = h[r], h[r + 1], h[r + 2], h[r + 3]
        for o in range(len(y)):
            y[o] += h0 * b0[o] + h1 * b1[o] + h2 * b2[o] + h3 * b3[o]


@njit(fastmath=MATH, nogil=True)
def _down_four(x: np.ndarray, a: np.ndarray, h: np.ndarray) -> None:
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    for r in range(0, len(a), 2):
        other = min(r + 1, len(a) - 1)
        p, q = a[r], a[other]
        p0 = p1 = p2 = p3 = q0 = q1 = q2 = q3 = np.float32(0)
        for i in range(len(p)):
            p0 += x0[i] * p[i]
            p1 += x1[i] * p[i]
            p2 += x2[i] * p[i]
            p3 += x3[i] * p[i]
            q0 += x0[i] * q[i]
            q1 += x1[i] * q[i]
            q2 += x2[i] * q[i]
            q3 += x3[i] * q[i]
        h[0, other], h[1, other], h[2, other], h[3, other] = q0, q1, q2, q3
        h[0, r], h[1, r], h[2, r], h[3, r] = p0, p1, p2, p3


@njit(fastmath=MATH, nogil=True)
def _up_four(y: np.ndarray, b: np.ndarray, h: np.ndarray) -> None:
    y0, y1, y2, y3 = y[0], y[1], y[2], y[3]
    for r in range(0, len(b), 2):
        p, q = b[r], b[min(r + 1, len(b) - 1)]
        p0, p1, p2, p3 = h[0, r], h[1, r], h[2, r], h[3, r]
        q0, q1, q2, q3 = h[0, r + 1], h[1, r + 1], h[2, r + 1], h[3, r + 1]
        for o in range(len(p)):
            y0[o] += p0 * p[o] + q0 * q[o]
            y1[o] += p1 * p[o] + q1 * q[o]
            y2[o] += p2 * p[o] + q2 * q[o]
            y3[o] += p3 * p[o] + q3 * q[o]
