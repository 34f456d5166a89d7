"""SlotTable: the served adapters that are in slots, as rows of one table a group of linears, for `kernels/lora.py`.

An adapter is written into its slot once, when it is first computed with, and its own tensors become views of the table,
so that no weight is held twice. Its slot is free again when nothing refers to the adapter. The table grows as long as
the device has memory; an adapter that finds no room is computed from its own tensors.

Shapes: L linears, K slots, P linears of a group, X rows of A and B, V rows of factors and shifts, I in, O out of all P.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from rankloom.banks.linear_groups import LinearGroup
from rankloom.banks.served_adapter import Factors, ServedAdapter
from rankloom.kernels.lora import count_splits, lora_expand, lora_shrink
from rankloom.models.device import free_cuda_bytes

RANK_STEP = 16
"""The largest rank is rounded up to a multiple of this."""
FEW = 2
"""Most tokens of an adapter for which each token is a block of its own."""
BLOCK = 16
"""Tokens of a block otherwise, as many as a tensor core takes."""
FEWEST = 64
"""Slots that a table begins with, and rows of A and B beside the one that is zero; doubled as needed."""

logger = logging.getLogger(__name__)


class _Size(NamedTuple):
    """What a table has room for."""

    slots: int
    rows: int
    vectors: int

    def extend_to(self, other: _Size) -> _Size:
        return _Size(*map(max, self, other))


class GroupRows:
    """The rows of one group of linears."""

    def __init__(self, group: LinearGroup, like: Tensor) -> None:
        """
        Args:
            like: has the device and the dtype of A and B.
        """
        self.group = group
        self.a_PXI = like.new_empty(len(group.widths), 0, group.num_in)
        self.b_XO = like.new_empty(0, sum(group.widths))
        self.vectors_VO = like.new_empty(0, sum(group.widths), dtype=torch.float32)
        self.slots_PK4 = like.new_empty(0)
        """Part of the table's."""

    def grow(self, size: _Size) -> None:
        """Make room, one tensor after the other; what is there keeps its place."""
        self.a_PXI = _enlarge(self.a_PXI, 1, size.rows)
        self.b_XO = _enlarge(self.b_XO, 0, size.rows)
        self.vectors_VO = _enlarge(self.vectors_VO, 0, size.vectors)

    def get_places(self, adapter: ServedAdapter, rows: range, vectors: range) -> dict[str, Factors]:
        """Return an adapter's places on these linears, as views."""
        found = {}
        for part, name in enumerate(self.group.names):
            if (own := adapter.linears.get(name)) is not None:
                span, outputs = slice(rows.start, rows.start + own.rank), self.group.get_outputs(part)
                found[name] = Factors(
                    self.a_PXI[part, span],
                    self.b_XO[span, outputs],
                    None if own.factor_O is None else self.vectors_VO[vectors.start, outputs],
                    None if own.shift_O is None else self.vectors_VO[vectors.stop - 1, outputs],
                )
        return found


@dataclass(frozen=True)
class SlotTokens:
    """The slots of a forward's tokens, in blocks; see `kernels/lora.py`."""

    slot_G: Tensor
    start_G1: Tensor
    block: int

    @classmethod
    def from_rows(cls, slot_N: Tensor) -> SlotTokens:
        """Return the blocks of single tokens, whose slots are on the device already, as int32."""
        return cls(slot_N, torch.arange(len(slot_N) + 1, dtype=torch.int32, device=slot_N.device), 1)

    @classmethod
    def from_counts(cls, counts: Sequence[tuple[int, int]], device: torch.device) -> SlotTokens:
        """Return the blocks of tokens that are sorted by slot.

        Args:
            counts: slots, -1 for none, and the numbers of their tokens.
        """
        block = 1 if max((count for slot, count in counts if slot >= 0), default=0) <= FEW else BLOCK
        slots: list[int] = []
        starts: list[int] = []
        stop = 0
        for slot, count in counts:
            begins = range(stop, stop + count, block if slot >= 0 else max(count, 1))
            slots += [slot] * len(begins)
            starts += begins
            stop += count
        values = [*slots, *starts, stop]
        host = torch.empty(len(values), dtype=torch.int32, pin_memory=device.type == "cuda")
        host.numpy()[:] = values
        both = host.to(device, non_blocking=True)
        return cls(both[: len(slots)], both[len(slots) :], block)


class SlotTable:
    """Invariant: the linears of an adapter with a slot are views of the table. One thread makes all calls."""

    def __init__(self, groups: Sequence[LinearGroup], like: Tensor) -> None:
        """
        Args:
            like: has the device and the dtype of A and B.
        """
        self.generation = 0
        """Counts the changes after which a recorded CUDA graph no longer holds."""
        self.rank = 0
        """The largest of an adapter, rounded up."""
        self.rows: dict[int, GroupRows] = {}
        """By the group's index; only groups that an adapter was on have any."""
        self._groups, self._like = groups, like
        self._first_linear = [0, *accumulate(len(group.names) for group in groups)]
        self._size = _Size(slots=FEWEST, rows=1 + FEWEST, vectors=0)
        self._slots_LK4 = like.new_zeros(self._first_linear[-1], self._size.slots, 4, dtype=torch.int32)
        self._slot_of: WeakKeyDictionary[ServedAdapter, int] = WeakKeyDictionary()
        self._spans: dict[int, tuple[range, range]] = {}
        """Slot -> its rows, and those of its factors and shifts."""
        self._dropped: deque[int] = deque()
        """Slots whose adapter is gone; other threads append."""
        self._refused: WeakSet[ServedAdapter] = WeakSet()
        """Adapters that found no room; tried again when a slot is free."""

    def shrink(self, rows: GroupRows, x_NI: Tensor, tokens: SlotTokens) -> Tensor:
        """Return x A of each token's adapter, for `expand`."""
        splits = count_splits(x_NI.shape[1], len(tokens.slot_G))
        return lora_shrink(
            x_NI, rows.a_PXI, rows.slots_PK4, tokens.slot_G, tokens.start_G1, tokens.block, self.rank, splits
        )

    def expand(self, rows: GroupRows, y_NO: Tensor, h_SND: Tensor, tokens: SlotTokens) -> None:
        """Change the base's result in place."""
        lora_expand(
            y_NO, h_SND, rows.b_XO, rows.vectors_VO, rows.slots_PK4, tokens.slot_G, tokens.start_G1, tokens.block,
            rows.group.widths,
        )  # fmt: skip

    def hold(self, adapter: ServedAdapter) -> int | None:
        """Return the adapter's slot, written at the first call; None: there is no room for it."""
        if (slot := self._slot_of.get(adapter)) is not None:
            return slot
        while self._dropped:
            del self._spans[self._dropped.popleft()]
            self._refused.clear()
        if adapter in self._refused:
            return None
        slot = next(slot for slot in range(len(self._spans) + 1) if slot not in self._spans)
        rows = _find_gap([range(1), *(rows for rows, _ in self._spans.values())], adapter.rank)  # row 0 is zero
        vectors = _find_gap([vectors for _, vectors in self._spans.values()], _count_vectors(adapter))
        if not self._make_room(adapter, _Size(slot + 1, rows.stop, vectors.stop)):
            self._refused.add(adapter)
            logger.warning("there is no memory for another adapter's slot; it is served, with more launches a step")
            return None
        self._write(adapter, slot, rows, vectors)
        self._slot_of[adapter], self._spans[slot] = slot, (rows, vectors)
        weakref.finalize(adapter, self._dropped.append, slot).atexit = False
        return slot

    def _make_room(self, adapter: ServedAdapter, needed: _Size) -> bool:
        """Grow as an adapter needs it; returns False where memory does not suffice."""
        indices = {i for i, group in enumerate(self._groups) if not adapter.linears.keys().isdisjoint(group.names)}
        rank = -(-adapter.rank // RANK_STEP) * RANK_STEP
        size = self._size.extend_to(needed)
        if size == self._size and rank <= self.rank and indices <= self.rows.keys():
            return True
        doubled = _Size(*(num if num == has else max(num, 2 * has) for has, num in zip(self._size, size, strict=True)))
        for larger in (doubled, size):
            try:
                if self._has_memory(indices | self.rows.keys(), larger):
                    self._grow(indices | self.rows.keys(), larger)
                    self.rank = max(self.rank, rank)
                    return True
            except torch.OutOfMemoryError:
                pass  # what was made larger is good for any size
        return False

    def _has_memory(self, indices: Collection[int], size: _Size) -> bool:
        """Return whether growing leaves half of the free memory to others."""
        if self._like.device.type != "cuda":
            return True
        more = self._count_bytes(indices, size) - self._count_bytes(self.rows, self._size)
        return more <= free_cuda_bytes(self._like.device) / 2

    def _count_bytes(self, indices: Collection[int], size: _Size) -> int:
        total = 0
        for group in (self._groups[index] for index in indices):
            num_out = sum(group.widths)
            row = (len(group.widths) * group.num_in + num_out) * self._like.element_size()
            total += row * size.rows + 4 * num_out * size.vectors
        return total

    def _grow(self, indices: Iterable[int], size: _Size) -> None:
        self.generation += 1
        self._slots_LK4 = _enlarge(self._slots_LK4, 1, size.slots)
        for index in indices:
            rows = self.rows.setdefault(index, GroupRows(self._groups[index], self._like))
            rows.slots_PK4 = self._slots_LK4[self._first_linear[index] : self._first_linear[index + 1]]
            try:
                rows.grow(size)
            finally:  # the smaller tensors are freed with their last view
                for adapter, slot in list(self._slot_of.items()):
                    adapter.linears.update(rows.get_places(adapter, *self._spans[slot]))
        self._size = size

    def _write(self, adapter: ServedAdapter, slot: int, rows: range, vectors: range) -> None:
        places: dict[str, Factors] = {}
        for group_rows in self.rows.values():
            places |= group_rows.get_places(adapter, rows, vectors)
        targets = [tensor for place in places.values() for tensor in place.list_tensors()]
        torch._foreach_copy_(targets, [tensor for name in places for tensor in adapter.linears[name].list_tensors()])
        names = [name for group in self._groups for name in group.names]
        columns = [_make_columns(adapter.linears.get(name), rows, vectors) for name in names]
        self._slots_LK4[:, slot] = torch.tensor(columns, dtype=torch.int32).to(self._like.device)
        adapter.linears.update(places)


def forecast_table_bytes(widths: Iterable[tuple[int, int]], num_adapters: int, rank: int, *, value_bytes: int) -> int:
    """Return the bytes of a table that has so many adapters without DoRA, all of one rank.

    Args:
        widths: inputs and outputs of the linears that they are on.
        value_bytes: of a value of A and B.
    """
    rows = 1 + FEWEST
    while rows < 1 + num_adapters * rank:
        rows *= 2
    return sum(rows * (num_in + num_out) * value_bytes for num_in, num_out in widths)


def _make_columns(own: Factors | None, rows: range, vectors: range) -> tuple[int, int, int, int]:
    """Return an adapter's entry on one linear, in the order of `kernels.lora.FIRST` and those after it."""
    if own is None:
        return 0, 0, -1, -1
    factor = -1 if own.factor_O is None else vectors.start
    shift = -1 if own.shift_O is None else vectors.stop - 1
    return rows.start, own.rank, factor, shift


def _count_vectors(adapter: ServedAdapter) -> int:
    factors = adapter.linears.values()
    return any(own.factor_O is not None for own in factors) + any(own.shift_O is not None for own in factors)


def _find_gap(taken: Iterable[range], count: int) -> range:
    """Return the first `count` numbers in a row that are not taken."""
    start = 0
    for span in sorted(taken, key=lambda span: span.start):
        if span.start - start >= count:
            break
        start = max(start, span.stop)
    return range(start, start + count)


def _enlarge(tensor: Tensor, dim: int, size: int) -> Tensor:
    if tensor.shape[dim] >= size:
        return tensor
    larger = tensor.new_zeros(*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
    larger.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return larger
