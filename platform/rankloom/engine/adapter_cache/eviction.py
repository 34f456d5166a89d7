"""Residency: which adapters are in memory, which one is loaded next, and in whose place. Decisions alone; no weights.

An adapter is asked for by the requests on it and by pins. One that nobody asks for stays until its place is needed; the
one that was not used for longest goes first. Where every place is asked for, who comes later waits.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

A = TypeVar("A")
"""What is held of an adapter."""


@dataclass
class CacheEntry(Generic[A]):
    adapter: A | None = None
    """None: not loaded yet."""
    users: int = 0
    pinned: bool = False

    @property
    def is_free(self) -> bool:
        return not self.users and not self.pinned


class EvictionPolicy(Generic[A]):
    """Invariant: no more than `capacity` adapters are loaded, or being loaded."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.entries: OrderedDict[str, CacheEntry[A]] = OrderedDict()
        """By ref, least recently used first; those that wait for a place too."""
        self._loading: set[str] = set()

    def ask(self, ref: str) -> None:
        """One more request is on it."""
        self._touch(ref).users += 1

    def release(self, ref: str) -> None:
        """One less. Of an adapter that is gone, because it failed, nothing is known."""
        if ref in self.entries:
            self.entries[ref].users -= 1
            self._forget_unwanted(ref)

    def pin(self, ref: str) -> bool:
        """Keep it from now on; False: all places are pinned already."""
        others = sum(entry.pinned for other, entry in self.entries.items() if other != ref)
        if others >= self.capacity:
            return False
        self._touch(ref).pinned = True
        return True

    def unpin(self, ref: str) -> None:
        if ref in self.entries:
            self.entries[ref].pinned = False
            self._forget_unwanted(ref)

    def get(self, ref: str) -> A | None:
        """The adapter, if it is loaded."""
        entry = self.entries.get(ref)
        return entry.adapter if entry else None

    def next_load(self) -> tuple[str, str | None] | None:
        """What is to be loaded now and what is to go for it; None: nothing can be. Counts as loading from then on."""
        wanted = [r for r, e in self.entries.items() if e.adapter is None and r not in self._loading]
        if not wanted:
            return None
        taken = [r for r, e in self.entries.items() if e.adapter is not None or r in self._loading]
        evicted = None
        if len(taken) >= self.capacity:
            free = [r for r in taken if self.entries[r].is_free and r not in self._loading]
            if not free:
                return None
            evicted = free[0]
            del self.entries[evicted]
        self._loading.add(wanted[0])
        return wanted[0], evicted

    def loaded(self, ref: str, adapter: A) -> None:
        self._loading.discard(ref)
        self.entries[ref].adapter = adapter

    def failed(self, ref: str) -> None:
        """Forget it, whoever asked for it."""
        self._loading.discard(ref)
        del self.entries[ref]

    def _touch(self, ref: str) -> CacheEntry[A]:
        entry = self.entries.setdefault(ref, CacheEntry())
        self.entries.move_to_end(ref)
        return entry

    def _forget_unwanted(self, ref: str) -> None:
        """One that nobody waits for any more need not be loaded."""
        entry = self.entries[ref]
        if entry.is_free and entry.adapter is None and ref not in self._loading:
            del self.entries[ref]
