"""GraphCache: functions of fixed shapes, each recorded once as a CUDA graph and replayed from then on.

A graph is kernels with their addresses. So a recorded function reads its inputs from tensors that stay, and its result
stays too: the next replay of the same key overwrites it. Inside a function nothing may wait for the device, and nothing
may come from the host's memory.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

R = TypeVar("R")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    result: Any


class GraphCache:
    """The graphs of one thread. They share a pool of memory, so they are never replayed at the same time."""

    def __init__(self, device: torch.device, most: int = 16) -> None:
        """
        Args:
            most: number of graphs that are kept; the least recently used goes first.
        """
        self.is_on = device.type == "cuda"
        """Whether functions are recorded; off after one that could not be."""
        self._most = most
        self._pool: Any = None
        self._seen: set[Hashable] = set()
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()

    @property
    def num_recorded(self) -> int:
        return len(self._recordings)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._recordings

    def run(self, key: Hashable, function: Callable[[], R]) -> R:
        """Return the function's result: computed at the first call of a key, recorded at the second, then replayed.

        Args:
            key: equal only for functions that launch the same kernels on the same tensors.

        Raises:
            torch.OutOfMemoryError: computing it, or recording it, which computes nothing; then all graphs are gone.
        """
        if (recording := self._recordings.get(key)) is not None:
            self._recordings.move_to_end(key)
            recording.graph.replay()
            found: R = recording.result
            return found
        if self.is_on and key in self._seen:  # the first call has compiled and allocated what it needs
            try:
                return self._record(key, function)
            except torch.OutOfMemoryError:
                self.clear()
                raise
            except RuntimeError as error:
                logger.warning("CUDA graphs are off, as a step could not be recorded: %s", error)
                self.clear()
                self.is_on = False
        self._seen.add(key)
        return function()

    def clear(self) -> None:
        """Drop all graphs, and so their memory."""
        self._recordings.clear()
        self._seen.clear()
        self._pool = None

    def _record(self, key: Hashable, function: Callable[[], R]) -> R:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # another thread may allocate meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        self._recordings[key] = _Recording(graph, result)
        if len(self._recordings) > self._most:
            self._seen.discard(self._recordings.popitem(last=False)[0])
        graph.replay()  # recording computed nothing
        return result
