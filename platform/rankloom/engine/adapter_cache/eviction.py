"""EvictionPolicy: which adapters are in memory, and which one a load replaces. Pure decisions, without weights.

Requests and pins use an adapter. One without either stays until its place is needed; the least recently used goes
first. Where every place is in use, later adapters wait.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

A = TypeVar("A")
"""An adapter as its engine keeps it."""


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
        """By ref, least recently used first; includes those that wait for a place."""
        self._loading: set[str] = set()

    def ask(self, ref: str) -> None:
        """Count one more request on an adapter."""
        self._touch(ref).users += 1

    def release(self, ref: str) -> None:
        """Count one request less; does nothing for an adapter that is gone because it failed."""
        if ref in self.entries:
            self.entries[ref].users -= 1
            self._forget_unwanted(ref)

    def pin(self, ref: str) -> bool:
        """Keep an adapter from now on. Returns False where all places are pinned already."""
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
        """Return the adapter if it is loaded."""
        entry = self.entries.get(ref)
        return entry.adapter if entry else None

    def choose_load(self) -> tuple[str, str | None] | None:
        """Return the ref to load now and the one to evict for it, or None; the first counts as loading from then on."""
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

    def mark_loaded(self, ref: str, adapter: A) -> None:
        self._loading.discard(ref)
        self.entries[ref].adapter = adapter

    def mark_failed(self, ref: str) -> None:
        """Forget an adapter, even if requests use it."""
        self._loading.discard(ref)
        del self.entries[ref]

    def _touch(self, ref: str) -> CacheEntry[A]:
        entry = self.entries.setdefault(ref, CacheEntry())
        self.entries.move_to_end(ref)
        return entry

    def _forget_unwanted(self, ref: str) -> None:
        """Forget an adapter that has no request or pin and is not loaded."""
        entry = self.entries[ref]
        if entry.is_free and entry.adapter is None and ref not in self._loading:
            del self.entries[ref]
