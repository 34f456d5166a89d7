"""The tokens that constrained completions may have next, as bits, found by a thread while the step is computed.

Shapes: G constrained sequences, W words of 32 bits, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask_par
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
    """Finds masks in a thread, which takes turns with no other: a state is not used by two at a time."""

    def __init__(self, vocabulary: int) -> None:
        self._num_words = -(-vocabulary // 32)
        self._thread = ThreadPoolExecutor(1, "rankloom-masks")
        self._executor = LLExecutor(min(MOST_THREADS, max(1, (os.cpu_count() or 1) // 2)))

    def begin(self, states: Sequence[Constraint]) -> list[TokenMask]:
        """Begin to find the masks of a step's constrained sequences."""
        if not states:
            return []
        bits_GW: Bits = np.zeros((len(states), self._num_words), np.int32)
        done = self._thread.submit(self._find, states, bits_GW)
        return [TokenMask(bits_GW, row, done) for row in range(len(states))]

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _find(self, states: Sequence[Constraint], bits_GW: Bits) -> None:
        matchers = []
        for row, state in enumerate(states):
            if isinstance(state, ChoiceState):
                set_bits(bits_GW[row], state.allowed)
            else:
                matchers.append((state.catch_up(), row))
        if matchers:
            fill_next_token_bitmask_par(self._executor, matchers, bits_GW)


def set_bits(bits_W: Bits, tokens: Sequence[int]) -> None:
    """Set the bits of some tokens."""
    allowed = np.asarray(tokens, np.uint32)
    np.bitwise_or.at(bits_W.view(np.uint32), allowed // 32, np.left_shift(np.uint32(1), allowed % 32))
