"""The products of served adapters in fp32 on a CPU, compiled by numba: one call for all the adapters of a forward, and
for linears that read one input.

A decoding row reads all of its adapter's weights for one token, so that memory is the limit. These kernels read the
weights where they lie, in fp32 or as the integers of `rounding.py`, once and at their true rank, at nearly the rate of
a plain sum over memory. With more tokens, four share what is read. `Factors.add_to` is the plain reference.

Tokens are computed side by side on torch's own threads, through libgomp's entry for compilers: numba's own may be those
of another pool, each one's idle threads in the other's way, or may not be called from two threads. What a forward's
calls have in common is laid out once (`KernelInput`): every line of Python between two products has cold caches.

Compiled once a machine, and kept in numba's cache.

Shapes: N tokens, S linears of the model in G groups, K adapters at work, I in, O out of a group, R rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic
from torch import Tensor

from rankloom.banks.served_adapter import Factors, ServedAdapter

A, B, SCALE, RANK, FACTOR, SHIFT = range(6)
"""Columns of a table, for an adapter on a linear layer: addresses, 0 for what it lacks, and its rank."""
NUM_COLUMNS = SHIFT + 1
X, Y, NUM_IN, NUM_OUT, NUM_TOKENS, PARTS, NUM_PARTS, SPANS, NUM_SHARES, EACH, TAKEN = range(11)
"""Fields of a group's call: addresses, sizes, tokens that a thread takes at once, and a counter of the chunks taken."""
NUM_FIELDS = TAKEN + 1
TABLE, START, STOP = range(3)
"""Columns of a call's parts, its linears: the address of a table, and the linear's outputs in O."""
CHUNKS = 4
"""Per thread (dynamic scheduling): a late or busy thread takes fewer."""
MATH = {"contract", "reassoc", "nsz"}
"""What the compiler may do to sums; nan and inf are preserved."""


class KernelSites:
    """The linears of a model, in groups that read one input."""

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        """
        Args:
            groups: I of each group, and the outputs of its linears.
        """
        ends_G = np.cumsum([len(widths) for _, widths in groups])
        self.first_parts_G = ends_G - [len(widths) for _, widths in groups]
        self.calls_GC = np.zeros((len(groups), NUM_FIELDS), np.int64)
        self.calls_GC[:, NUM_IN] = [num_in for num_in, _ in groups]
        self.calls_GC[:, NUM_OUT] = [sum(widths) for _, widths in groups]
        self.calls_GC[:, NUM_PARTS] = [len(widths) for _, widths in groups]
        stops = [np.cumsum(widths) for _, widths in groups]
        self.parts_S3 = np.zeros((ends_G[-1], 3), np.int64)
        self.parts_S3[:, STOP] = np.concatenate(stops)
        self.parts_S3[:, START] = self.parts_S3[:, STOP] - np.concatenate([widths for _, widths in groups])


class KernelInput:
    """The adapters of a forward, and the tokens of each."""

    def __init__(
        self, adapters: Sequence[ServedAdapter], table_SK6: np.ndarray, spans_K2: np.ndarray, sites: KernelSites
    ) -> None:
        """
        Args:
            table_SK6: the `build_addresses` of each adapter on each linear layer, group by group.
            spans_K2: each adapter's first token, and the one after its last; ascending.
        """
        assert table_SK6.flags.c_contiguous
        assert spans_K2.flags.c_contiguous
        assert table_SK6.dtype == spans_K2.dtype == np.int64
        self._run, num_tokens, most = load_kernel(), int(spans_K2[-1, 1]), torch.get_num_threads()
        each = max(1, num_tokens // (CHUNKS * most))
        self._num_threads = min(most, -(-num_tokens // each))
        parts_S3, self._calls_GC = sites.parts_S3.copy(), sites.calls_GC.copy()
        parts_S3[:, TABLE] = table_SK6.ctypes.data + np.arange(len(table_SK6)) * table_SK6.strides[0]
        self._calls_GC[:, PARTS] = parts_S3.ctypes.data + sites.first_parts_G * parts_S3.strides[0]
        constants = {NUM_TOKENS: num_tokens, SPANS: spans_K2.ctypes.data, NUM_SHARES: len(spans_K2), EACH: each}
        self._calls_GC[:, list(constants)] = list(constants.values())
        self._first, self._fields = self._calls_GC.ctypes.data, self._calls_GC.data.cast("B").cast("q")
        self._held = adapters, table_SK6, spans_K2, parts_S3  # the calls have their addresses

    def add_to(self, y_NO: Tensor, x_NI: Tensor, group: int) -> Tensor:
        """Return the base's result as each share's `Factors.add_to` would change it; in fp32 it is changed in place.

        Args:
            x_NI, y_NO: of all the spans' tokens, of one dtype, y contiguous; dimensions of 1 before N don't matter.
            group: its place in G.
        """
        if y_NO.dtype is not torch.float32:
            return self.add_to(y_NO.float(), x_NI.float(), group).to(y_NO.dtype)
        x_NI, at = x_NI.contiguous(), group * NUM_FIELDS
        assert x_NI.dtype is torch.float32
        assert y_NO.is_contiguous()
        assert x_NI.numel() >= self._fields[at + NUM_TOKENS] * self._fields[at + NUM_IN]
        self._fields[at + X], self._fields[at + Y], self._fields[at + TAKEN] = x_NI.data_ptr(), y_NO.data_ptr(), 0
        self._run(self._first + at * 8, self._num_threads)
        return y_NO


def gather_factors(linears: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return them with A and B side by side, in one array: integers as they are, others in fp32."""
    parts = [part for own in linears.values() for part in (own.a_RI, own.b_RO)]
    dtypes = [torch.int16 if part.dtype is torch.int16 else torch.float32 for part in parts]
    sizes = [-(-part.numel() * dtype.itemsize // 4) for part, dtype in zip(parts, dtypes, strict=True)]
    places = torch.empty(sum(sizes)).split(sizes)  # where the system is asked for large pages
    copies = (
        place.view(dtype)[: part.numel()].view_as(part).copy_(part)
        for place, dtype, part in zip(places, dtypes, parts, strict=True)
    )
    return {name: replace(own, a_RI=next(copies), b_RO=next(copies)) for name, own in linears.items()}


def build_addresses(adapter: ServedAdapter, sites: Sequence[str]) -> np.ndarray:
    """Return an adapter's part of a table [S, 6], for the linears of these names."""
    rows = [_list_addresses(adapter.linears.get(name)) for name in sites]
    return np.array(rows, dtype=np.int64).reshape(-1, NUM_COLUMNS)


@cache
def load_kernel() -> Callable[[int, int], None]:
    """Return the compiled launcher `launch(call_address, num_threads)`. Compiling takes seconds when not cached."""
    signature = types.void(types.CPointer(types.int64))
    try:
        part = cfunc(signature, cache=True)(_compute_part)
    except RuntimeError:  # nowhere to write: every process compiles
        part = cfunc(signature)(_compute_part)
    try:
        region = ctypes.CDLL(None).GOMP_parallel  # torch made its own known to the process
    except (AttributeError, OSError, TypeError):  # another OpenMP, or none
        return lambda call, _: part.ctypes(ctypes.cast(call, ctypes.POINTER(ctypes.c_int64)))
    region.restype, region.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    address = part.address
    return lambda call, num_threads: region(address, call, num_threads, 0)


def _list_addresses(factors: Factors | None) -> list[int]:
    if factors is None:
        return [0] * NUM_COLUMNS
    a_RI, b_RO, others = factors.a_RI, factors.b_RO, (factors.scale_R, factors.factor_O, factors.shift_O)
    assert a_RI.dtype == b_RO.dtype == (torch.float32 if factors.scale_R is None else torch.int16)
    assert all(t is None or t.dtype is torch.float32 for t in others)
    assert all(t.is_contiguous() for t in factors.list_tensors())
    a, b, scale, factor, shift = (0 if t is None else t.data_ptr() for t in (a_RI, b_RO, *others))
    return [a, b, scale, factors.rank, factor, shift]


def _make_cast(kind: Any) -> Any:
    """Return an intrinsic of numba that makes a pointer of an address."""

    def cast(_typing: Any, _address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return intrinsic(cast)


def _take_next(_typing: Any, _call: Any) -> Any:
    """Count a call's TAKEN up in numba, and return what it was; no two threads get the same."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        taken = builder.gep(arguments[0], [context.get_constant(types.intp, TAKEN)])
        return builder.atomic_rmw("add", taken, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), generate


_floats_at: Any = _make_cast(types.float32)
_shorts_at: Any = _make_cast(types.int16)
_ints_at: Any = _make_cast(types.int64)
_take: Any = intrinsic(_take_next)


def _compute_part(call: Any) -> None:
    """Compute one thread's part of a call."""
    c = carray(call, NUM_FIELDS)
    num_tokens, num_shares, each = c[NUM_TOKENS], c[NUM_SHARES], c[EACH]
    x, y = carray(_floats_at(c[X]), (num_tokens, c[NUM_IN])), carray(_floats_at(c[Y]), (num_tokens, c[NUM_OUT]))
    parts, spans = carray(_ints_at(c[PARTS]), (c[NUM_PARTS], 3)), carray(_ints_at(c[SPANS]), (num_shares, 2))
    rank = 0
    for part in parts:
        rank = max(rank, carray(_ints_at(part[TABLE]), (num_shares, NUM_COLUMNS))[:, RANK].max())
    h = np.empty((4, rank + 1), np.float32)
    first = _take(call) * each
    while first < num_tokens:
        last = min(first + each, num_tokens)
        for k in range(num_shares):
            start, stop = max(spans[k, 0], first), min(spans[k, 1], last)
            if start < stop:
                for part in parts:
                    row = carray(_ints_at(part[TABLE]), (num_shares, NUM_COLUMNS))[k]
                    _add(x, y, part, row, h, start, stop)
        first = _take(call) * each


# The kernels below take one token and read its weights row by row, as memory delivers them fastest; or four tokens and
# two ranks at once. Where the rank is odd, the last one is computed again, and `h` is zero beyond it.


@njit(fastmath=MATH, nogil=True)
def _add(x: np.ndarray, y: np.ndarray, part: np.ndarray, row: np.ndarray, h: np.ndarray, first: int, last: int) -> None:
    """Add an adapter to a linear's results, of its tokens from `first` up to `last`."""
    rank, start, stop = row[RANK], part[START], part[STOP]
    a_shape, b_shape = (rank, x.shape[1]), (rank, stop - start)
    if rank > 0 and row[SCALE] != 0:
        a, b = carray(_shorts_at(row[A]), a_shape), carray(_shorts_at(row[B]), b_shape)
        _add_product(x, y, start, stop, a, b, carray(_floats_at(row[SCALE]), rank), h, first, last)
    elif rank > 0:
        a, b = carray(_floats_at(row[A]), a_shape), carray(_floats_at(row[B]), b_shape)
        _add_product(x, y, start, stop, a, b, h[0, :0], h, first, last)
    if row[FACTOR] != 0:
        factor = carray(_floats_at(row[FACTOR]), stop - start)
        for t in range(first, last):
            y[t, start:stop] *= factor
    if row[SHIFT] != 0:
        shift = carray(_floats_at(row[SHIFT]), stop - start)
        for t in range(first, last):
            y[t, start:stop] += shift


@njit(fastmath=MATH, nogil=True)
def _add_product(
    x: np.ndarray,
    y: np.ndarray,
    start: int,
    stop: int,
    a: np.ndarray,
    b: np.ndarray,
    scale: np.ndarray,
    h: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Add x A B; `scale`: of each rank, or empty."""
    h[:, len(a)] = 0
    fours = first + (last - first) // 4 * 4
    for t in range(first, fours, 4):
        _shrink_four(x[t : t + 4], a, h)
        for r in range(len(scale)):
            h[:, r] *= scale[r]
        _expand_four(y[t, start:stop], y[t + 1, start:stop], y[t + 2, start:stop], y[t + 3, start:stop], b, h)
    for t in range(fours, last):
        _shrink_one(x[t], a, h[0])
        for r in range(len(scale)):
            h[0, r] *= scale[r]
        _expand_one(y[t, start:stop], b, h[0])


@njit(fastmath=MATH, nogil=True)
def _shrink_one(x: np.ndarray, a: np.ndarray, h: np.ndarray) -> None:
    for r in range(len(a)):
        row, total = a[r], np.float32(0)
        for i in range(len(x)):
            total += x[i] * np.float32(row[i])
        h[r] = total


@njit(fastmath=MATH, nogil=True)
def _expand_one(y: np.ndarray, b: np.ndarray, h: np.ndarray) -> None:
    for r in range(len(b)):
        row, factor = b[r], h[r]
        for o in range(len(y)):
            y[o] += factor * np.float32(row[o])


@njit(fastmath=MATH, nogil=True)
def _shrink_four(x: np.ndarray, a: np.ndarray, h: np.ndarray) -> None:
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    for r in range(0, len(a), 2):
        other = min(r + 1, len(a) - 1)
        p, q = a[r], a[other]
        p0 = p1 = p2 = p3 = q0 = q1 = q2 = q3 = np.float32(0)
        for i in range(len(p)):
            u, v = np.float32(p[i]), np.float32(q[i])
            p0 += x0[i] * u
            p1 += x1[i] * u
            p2 += x2[i] * u
            p3 += x3[i] * u
            q0 += x0[i] * v
            q1 += x1[i] * v
            q2 += x2[i] * v
            q3 += x3[i] * v
        h[0, other], h[1, other], h[2, other], h[3, other] = q0, q1, q2, q3
        h[0, r], h[1, r], h[2, r], h[3, r] = p0, p1, p2, p3


@njit(fastmath=MATH, nogil=True)
def _expand_four(y0: np.ndarray, y1: np.ndarray, y2: np.ndarray, y3: np.ndarray, b: np.ndarray, h: np.ndarray) -> None:
    for r in range(0, len(b), 2):
        p, q = b[r], b[min(r + 1, len(b) - 1)]
        p0, p1, p2, p3 = h[0, r], h[1, r], h[2, r], h[3, r]
        q0, q1, q2, q3 = h[0, r + 1], h[1, r + 1], h[2, r + 1], h[3, r + 1]
        for o in range(len(p)):
            z0, z1, z2, z3 = y0[o], y1[o], y2[o], y3[o]  # first: rows some 4 KiB apart seem to be what was just stored
            u, v = np.float32(p[o]), np.float32(q[o])
            y0[o] = z0 + p0 * u + q0 * v
            y1[o] = z1 + p1 * u + q1 * v
            y2[o] = z2 + p2 * u + q2 * v
            y3[o] = z3 + p3 * u + q3 * v
