"""Groups: which slot each token of a batch belongs to, and the index tensors that grouped products need.

Shapes: N tokens sorted by slot, K slots, C slots at work, T most tokens of a slot, P = C·T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

RANK_STEP = 8
"""What the fast path rounds the rank of a bank's stacks up to, for aligned rows."""
PADDED = 3
"""On a GPU, the most positions that a host computes in its banks' products for one token, padding included."""


class Groups:
    """The slot of each token: the first `start` tokens have none, then come those of slot 0, of slot 1 and so on.

    Args:
        counts: tokens of each slot.
        ranks: true rank of each slot's adapter; A and B are zero beyond it. A slot of rank 0 has no adapter.
    """

    def __init__(self, counts: Sequence[int], ranks: Sequence[int], *, start: int = 0) -> None:
        self.counts, self.ranks, self.start = tuple(counts), tuple(ranks), start
        self.spans: dict[int, slice] = {}
        """Tokens of each slot at work: one that has both tokens and an adapter."""
        stop = start
        for slot, (count, rank) in enumerate(zip(counts, ranks, strict=True)):
            if count and rank:
                self.spans[slot] = slice(stop, stop + count)
            stop += count
        self.num_tokens = stop
        self.slots = tuple(self.spans)
        self.rank = max((ranks[slot] for slot in self.slots), default=0)
        self.most = max((counts[slot] for slot in self.slots), default=0)
        self._tensors: dict[tuple[Any, ...], Tensor] = {}

    @cached_property
    def whole(self) -> slice | None:
        """The tokens of all slots at work, where they are adjacent; else None."""
        spans = list(self.spans.values())
        whole = slice(spans[0].start, spans[-1].stop)
        return whole if whole.stop - whole.start == sum(self.counts[slot] for slot in self.slots) else None

    @cached_property
    def is_even(self) -> bool:
        """Whether the slots at work have equally many tokens, all adjacent: [N] is [C, T] then."""
        return self.whole is not None and len(self.slots) * self.most == self.whole.stop - self.whole.start

    @property
    def parts(self) -> Sequence[Groups]:
        """The slots at work, in parts that padding makes at most `PADDED` times as large."""
        return self._parts or (self,)

    @cached_property
    def _parts(self) -> Sequence[Groups]:
        """Empty where one part is enough."""
        parts: list[list[int]] = []
        tokens = 0
        for slot in sorted(self.slots, key=lambda slot: -self.counts[slot]):
            tokens += self.counts[slot]
            if not parts or (len(parts[-1]) + 1) * self.counts[parts[-1][0]] > PADDED * tokens:
                parts.append([])
                tokens = self.counts[slot]
            parts[-1].append(slot)
        if len(parts) <= 1:
            return ()
        ranks_of = [[rank if slot in part else 0 for slot, rank in enumerate(self.ranks)] for part in parts]
        return [Groups(self.counts, ranks, start=self.start) for ranks in ranks_of]

    def get_index(self, device: torch.device) -> slice | Tensor:
        """Return an index of the slots at work: a slice, and so a view, where they are adjacent."""
        first, last = self.slots[0], self.slots[-1]
        if last - first + 1 == len(self.slots):
            return slice(first, last + 1)
        return self._cache(device, "index", lambda: torch.tensor(self.slots))

    def get_places(self, device: torch.device) -> Tensor:
        """Return the token [P] at each place of [C, T]; on padding, the slot's own last one."""
        return self._cache(device, "places", lambda: self._make_places_CT().flatten())

    def get_tokens(self, device: torch.device) -> Tensor:
        """Return the tokens of the slots at work."""
        return self._cache(device, "tokens", lambda: self._make_places_CT()[~self._make_padding_CT()])

    def get_token_places(self, device: torch.device) -> Tensor:
        """Return the place in P of each token of the slots at work."""
        return self._cache(device, "token_places", lambda: torch.nonzero(~self._make_padding_CT().flatten()).flatten())

    def get_owners(self, device: torch.device) -> Tensor:
        """Return each token's slot [N]; K, one past the last, where that slot is not at work."""

        def make() -> Tensor:
            owners_N = torch.full((self.num_tokens,), len(self.counts))
            for slot, span in self.spans.items():
                owners_N[span] = slot
            return owners_N

        return self._cache(device, "owners", make)

    def get_padding(self, device: torch.device) -> Tensor:
        """Return which places are padding [C, T, 1]."""
        return self._cache(device, "padding", lambda: self._make_padding_CT()[..., None])

    def get_scales(self, scale_K: Sequence[float], like: Tensor) -> Tensor:
        """Return the scales of the slots at work [C, 1, 1], in the dtype and on the device of `like`."""
        scale_C = tuple(scale_K[slot] for slot in self.slots)
        return self._cache(
            like.device, (like.dtype, scale_C), lambda: torch.tensor(scale_C, dtype=like.dtype)[:, None, None]
        )

    def _cache(self, device: torch.device, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """Make a tensor once for all layers, which mostly need the same."""
        if (device, key) not in self._tensors:
            self._tensors[device, key] = make().to(device, non_blocking=True)
        return self._tensors[device, key]

    def _make_places_CT(self) -> Tensor:
        starts_C = torch.tensor([span.start for span in self.spans.values()])
        return starts_C[:, None] + torch.minimum(torch.arange(self.most), self._make_counts_C1() - 1)

    def _make_padding_CT(self) -> Tensor:
        return torch.arange(self.most) >= self._make_counts_C1()

    def _make_counts_C1(self) -> Tensor:
        return torch.tensor([[self.counts[slot]] for slot in self.slots])
