"""The tokens that constrained completions may have next, as bits, found by a thread while the step is computed.

Shapes: G constrained sequences, W words of 32 bits, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankloom.engine.choices import ChoiceState
from rankloom.engine.grammar import GrammarState

Constraint = ChoiceState | GrammarState
Bits = NDArray[np.int32]
MOST_THREADS = 8


@dataclass(frozen=True)
class TokenMask:
    """The tokens that one sequence may have next."""

    bits_GW: Bits
    row: int
    done: Future[None]

    def read(self) -> Bits:
        """Return the bits [W], once they are there."""
        self.done.result()
        bits_W: Bits = self.bits_GW[self.row]
        return bits_W


class Masker:
    """Finds the masks of a step's sequences while the step is computed; those that take long, before it.

    No step waits for a slow mask: its sequence `lags`, and takes part once it is prepared.
    """

    def __init__(self, vocabulary: int, wake: Callable[[], None]) -> None:
        """
        Args:
            wake: thread-safe; called when a sequence lags no longer.
        """
        self._num_words, self._wake = -(-vocabulary // 32), wake
        self._num_threads = min(MOST_THREADS, max(1, (os.cpu_count() or 1) // 2))
        self._threads = ThreadPoolExecutor(self._num_threads, "rankloom-masks")
        self._slow_thread = ThreadPoolExecutor(1, "rankloom-slow-masks")
        self._preparing: set[GrammarState] = set()

    def begin(self, states: Sequence[Constraint]) -> list[TokenMask]:
        """Begin to find the masks of a step's constrained sequences."""
        bits_GW: Bits = np.zeros((len(states), self._num_words), np.int32)
        shares = [range(first, len(states), self._num_threads) for first in range(self._num_threads)]
        jobs = [self._threads.submit(_find, states, bits_GW, rows) for rows in shares if rows]
        return [TokenMask(bits_GW, row, jobs[row % self._num_threads]) for row in range(len(states))]

    def lags(self, state: Constraint | None) -> bool:
        """Return whether a sequence has to wait for its mask, which is begun."""
        if not isinstance(state, GrammarState) or not state.is_slow or state.prepared is not None:
            return False
        if state not in self._preparing:
            self._preparing.add(state)
            self._slow_thread.submit(self._prepare, state)
        return True

    def close(self) -> None:
        for threads in (self._threads, self._slow_thread):
            threads.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, state: GrammarState) -> None:
        try:
            state.prepare()
        finally:
            self._preparing.discard(state)
            self._wake()


def _find(states: Sequence[Constraint], bits_GW: Bits, rows: Iterable[int]) -> None:
    for row in rows:
        state = states[row]
        if isinstance(state, ChoiceState):
            set_bits(bits_GW[row], state.allowed)
        else:
            bits_GW[row] = state.find_mask()[: bits_GW.shape[1]]


def set_bits(bits_W: Bits, tokens: Sequence[int]) -> None:
    """Set the bits of some tokens."""
    allowed = np.asarray(tokens, np.uint32)
    np.bitwise_or.at(bits_W.view(np.uint32), allowed // 32, np.left_shift(np.uint32(1), allowed % 32))
