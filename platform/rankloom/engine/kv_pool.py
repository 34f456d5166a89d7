"""KvPool: the KV cache of a GPU, all of which is allocated at the start.

It is cut into pages of `PAGE` tokens. A sequence has pages anywhere, as many as it needs now; a table on the device
names them in order. So no sequence ever moves, memory can't run out later, and what a CUDA graph reads stays in place.

Shapes: L layers, S pages in all, T tokens of a page, H key and value heads, E width of a head, P pages of a sequence,
t tokens, F numbers of a token in all layers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rankloom.engine.kv_cache import NARROWEST, KvShape, States
from rankloom.errors import ConfigError
from rankloom.models.device import free_cuda_bytes

PAGE = NARROWEST
"""Tokens of a page."""
NOBODYS = 0
"""The page that rows without a sequence write to."""


class KvPool:
    """The keys and values of each sequence, by request id, as `KvCache`."""

    def __init__(self, shape: KvShape, capacity: int) -> None:
        """
        Args:
            shape: a uniform one.
            capacity: in tokens; rounded down to whole pages.

        Raises:
            ConfigError: the device has no memory for it.
        """
        self.shape, num_pages = shape, capacity // PAGE
        self.capacity = self.size = num_pages * PAGE
        """Tokens that sequences may take now, and that there are."""
        assert shape.is_uniform
        first = shape.layers[0]
        sizes = (2, len(shape.layers), 1 + num_pages, PAGE, first.num_heads, first.key_width)
        try:
            # zeros: what is masked is still multiplied, and must be finite
            self.blocks_2LSTHE = torch.zeros(sizes, dtype=shape.dtype, device=shape.device)
        except torch.OutOfMemoryError:
            raise ConfigError(_explain_too_large(shape, self.size)) from None
        self.states: dict[str, States] = {}
        """None: what has states is served over a `KvCache`."""
        self._free = list(range(num_pages, NOBODYS, -1))
        self._pages: dict[str, list[int]] = {}

    def __contains__(self, id: str) -> bool:
        return id in self._pages

    @property
    def held(self) -> int:
        """Tokens that the sequences have places for."""
        return sum(map(len, self._pages.values())) * PAGE

    @property
    def longest(self) -> int:
        """The most tokens of a sequence."""
        return self.size

    @staticmethod
    def compute_room(length: int) -> int:
        """Return the tokens that a sequence of this length takes."""
        return count_pages(length) * PAGE

    def get_pages(self, id: str) -> list[int]:
        """Return a sequence's pages, in order."""
        return self._pages[id]

    def get_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of a layer [S, T, H, E]."""
        keys_STHE, values_STHE = self.blocks_2LSTHE[:, index]
        return keys_STHE, values_STHE

    def reserve(self, id: str, length: int) -> None:
        """Give a sequence, new or not, pages for `length` tokens; the caller keeps to `capacity`.

        Raises:
            torch.OutOfMemoryError: there are too few; every sequence keeps its pages.
        """
        missing = count_pages(length) - len(self._pages.get(id, ()))
        if missing > len(self._free):
            raise torch.OutOfMemoryError(f"the KV cache has {len(self._free)} free pages, but {missing} are needed")
        pages = self._pages.setdefault(id, [])
        for _ in range(missing):
            pages.append(self._free.pop())

    def remove(self, id: str) -> None:
        self._free += reversed(self._pages.pop(id))

    def read(self, id: str, start: int, stop: int) -> Tensor:
        """Copy a span of a sequence's keys and values [t, F]."""
        found_2LtHE = self._flatten_pages().index_select(2, self._locate(id, range(start, stop)))
        return found_2LtHE.permute(2, 0, 1, 3, 4).flatten(1)

    def write(self, id: str, start: int, values_tF: Tensor) -> None:
        """Write what `read` returned, from `start`."""
        pages_2LtHE = self._flatten_pages()
        num_tokens = len(values_tF)
        num_kinds, num_layers, _, num_heads, width = pages_2LtHE.shape
        values_2LtHE = values_tF.view(num_tokens, num_kinds, num_layers, num_heads, width).permute(1, 2, 0, 3, 4)
        pages_2LtHE.index_copy_(2, self._locate(id, range(start, start + num_tokens)), values_2LtHE)

    def _flatten_pages(self) -> Tensor:
        return self.blocks_2LSTHE.flatten(2, 3)

    def _locate(self, id: str, positions: Iterable[int]) -> Tensor:
        pages = self._pages[id]
        places = [pages[position // PAGE] * PAGE + position % PAGE for position in positions]
        return torch.tensor(places, device=self.shape.device)


def count_pages(length: int) -> int:
    """Return the pages of a sequence of this many tokens."""
    return -(-length // PAGE)


def _explain_too_large(shape: KvShape, num_tokens: int) -> str:
    gib = 1 << 30
    needed, free = num_tokens * shape.bytes_per_token / gib, free_cuda_bytes(shape.device) / gib
    return (
        f"engine.kv_cache_tokens={num_tokens}: takes {needed:.1f} GiB of {shape.device}, of which {free:.1f} GiB are "
        f"free beside the base; set fewer, or null for as many as fit"
    )
