"""RowCache: keys and values of every row's tokens, in shelves of rows of like lengths.

Attention over many rows at once is fastest on one dense block, and a block is as wide as its longest row. So rows lie
on shelves, whose widths are powers of two; one that outgrows its shelf moves to the next, each token of it at most once
a doubling. On a shelf the rows are the first ones, without gaps: a block is a view, never gathered. A step allocates
nothing; a shelf is resized when rows come that it has no place for, within the budget of tokens.

Shapes: R rows of a shelf, H key and value heads, T width, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankloom.models.device import free_cuda_bytes

NARROWEST = 256
"""Tokens of the first shelf's rows."""
ON_CPU = 16384
"""Tokens of a cache, where the device is no GPU."""
OF_THE_FREE = 0.5
"""The cache's part of a GPU's memory beside the base. The rest is for adapters, prefixes and what steps compute."""


def shelf_width(length: int) -> int:
    """The width of the shelf for a row of so many tokens."""
    return max(NARROWEST, 1 << (length - 1).bit_length())


@dataclass(frozen=True)
class HeadShape:
    """What a model's layers keep of a token."""

    num_layers: int
    num_heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_heads * self.width * self.dtype.itemsize


def room_for(shape: HeadShape, num_rows: int, longest: int | None) -> int:
    """Tokens of a cache beside what the device holds already.

    Args:
        longest: tokens that a row can have; None: any number.
    """
    if shape.device.type != "cuda":
        return ON_CPU
    tokens = int(OF_THE_FREE * free_cuda_bytes(shape.device)) // shape.bytes_per_token
    most = num_rows * shelf_width(longest) if longest else tokens
    return max(NARROWEST, min(tokens, most))


class KvBucket:
    """Rows of up to `width` tokens beside each other."""

    def __init__(self, shape: HeadShape, width: int) -> None:
        self.width = width
        self.rows: list[str] = []
        """Request ids by place."""
        # zeros: what is masked is still multiplied, and must be finite
        empty = torch.zeros(0, shape.num_heads, width, shape.width, dtype=shape.dtype, device=shape.device)
        self.keys_RHTE = [empty] * shape.num_layers
        self.values_RHTE = [empty] * shape.num_layers

    @property
    def num_places(self) -> int:
        return len(self.keys_RHTE[0])

    def resize(self, num_places: int) -> None:
        """Raises torch.OutOfMemoryError; all rows are still there then, and all blocks of one size."""
        kept = len(self.rows)
        try:
            for layers in (self.keys_RHTE, self.values_RHTE):
                for i, before in enumerate(layers):  # one by one, so that little is there twice
                    grown = before.new_zeros(num_places, *before.shape[1:])
                    grown[:kept] = before[:kept]
                    layers[i] = grown
        finally:
            least = min(map(len, self.blocks()))
            for layers in (self.keys_RHTE, self.values_RHTE):
                layers[:] = [block[:least] for block in layers]

    def blocks(self) -> Sequence[Tensor]:
        return (*self.keys_RHTE, *self.values_RHTE)


class KvCache:
    """Where each row's keys and values are.

    Invariant: the shelves together have places for no more than `capacity` tokens.
    """

    def __init__(self, shape: HeadShape, capacity: int) -> None:
        self.shape, self.capacity = shape, capacity
        self.shelves: dict[int, KvBucket] = {}
        """By width."""
        self._widths: dict[str, int] = {}

    def __contains__(self, row: str) -> bool:
        return row in self._widths

    @property
    def held(self) -> int:
        """Tokens that rows have places for."""
        return sum(self._widths.values())

    def at(self, row: str) -> tuple[KvBucket, int]:
        """A row's shelf and place."""
        shelf = self.shelves[self._widths[row]]
        return shelf, shelf.rows.index(row)

    def reserve(self, row: str, length: int) -> None:
        """Make sure that a row, new or not, has a place for so many tokens; the caller keeps to `capacity`.

        Raises torch.OutOfMemoryError where the device has none for it; every row is where it was.
        """
        width, before = shelf_width(length), self._widths.get(row)
        if before is not None and before >= width:
            return
        shelf = self.shelves.setdefault(width, KvBucket(self.shape, width))
        if len(shelf.rows) == shelf.num_places:
            self._extend(shelf)
        place = len(shelf.rows)
        if before is not None:
            old, old_place = self.at(row)
            for target, source in zip(shelf.blocks(), old.blocks(), strict=True):
                target[place, :, :before] = source[old_place]
            self.remove(row)
        shelf.rows.append(row)
        self._widths[row] = width

    def remove(self, row: str) -> None:
        """Forget a row; the shelf's last one takes its place."""
        shelf, place = self.at(row)
        last = len(shelf.rows) - 1
        if place != last:
            for block in shelf.blocks():
                block[place] = block[last]
            shelf.rows[place] = shelf.rows[last]
        shelf.rows.pop()
        del self._widths[row]

    def read(self, row: str, start: int, stop: int) -> Tensor:
        """[2, L, H, t, E]: a copy of a span of a row's keys and values."""
        shelf, place = self.at(row)
        spans = [block[place, :, start:stop] for block in shelf.blocks()]
        return torch.stack(spans).unflatten(0, (2, -1))

    def write(self, row: str, start: int, values: Tensor) -> None:
        """The inverse of `read`."""
        shelf, place = self.at(row)
        for block, span in zip(shelf.blocks(), values.flatten(0, 1), strict=True):
            block[place, :, start : start + span.shape[1]] = span

    def _extend(self, shelf: KvBucket) -> None:
        """Twice the places, or as many as the budget has, others' unused ones given up first."""
        wanted = max(4, 2 * shelf.num_places)
        if self._allocated() + (wanted - shelf.num_places) * shelf.width > self.capacity:
            self._give_up_unused(shelf)
            spare = (self.capacity - self._allocated()) // shelf.width
            wanted = min(wanted, shelf.num_places + max(1, spare))
        try:
            shelf.resize(wanted)
        except torch.OutOfMemoryError:
            self._give_up_unused(shelf)
            shelf.resize(shelf.num_places + 1)

    def _give_up_unused(self, but: KvBucket) -> None:
        for width, other in list(self.shelves.items()):
            if other is not but and not other.rows:
                del self.shelves[width]
            elif other is not but:
                other.resize(len(other.rows))

    def _allocated(self) -> int:
        return sum(shelf.num_places * width for width, shelf in self.shelves.items())
