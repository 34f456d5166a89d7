"""Which sequences run, and which tokens a step computes: pure decisions that `core.py` carries out.

First come, first served. A sequence that decodes gets its token at every step, whatever prompts come in; prompts share
the rest of a step's tokens. When sequences outgrow the cache, the youngest is preempted, so that the oldest always
finishes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

MOST_SCORED = 512
"""Tokens of a step whose logits are all kept: for 150,000 words these are 300 MB."""


@dataclass(frozen=True)
class SequenceState:
    """A request as the scheduler sees it."""

    id: str
    arrival: int
    length: int
    """Tokens of prompt and completion so far."""
    cached: int = 0
    """How many of these have keys and values in the cache."""
    ready: bool = True
    """Whether its adapter is loaded."""
    stops: tuple[int, ...] = ()
    """Numbers of tokens at which a chunk ends, as the states after them are to be kept."""
    whole: bool = False
    """Whether its first chunk may be as long as it is, as another one after it would be slow."""
    predicts: bool = True
    """Whether a token is sampled after its last one."""
    scored: bool = False
    """Whether the logits after each of its tokens are read."""


@dataclass(frozen=True)
class StepBudget:
    """What a step may use."""

    num_seqs: int
    cache_tokens: int
    batched_tokens: int


@dataclass(frozen=True)
class BatchChange:
    """The sequences that leave the batch, and those that then join it."""

    preempted: tuple[str, ...]
    admitted: tuple[str, ...]


@dataclass(frozen=True)
class ScheduledChunk:
    """The tokens of one sequence in a step."""

    id: str
    start: int
    count: int
    predicts: bool
    """Whether these are all its tokens, so that the next one is sampled."""


def change_batch(
    running: Sequence[SequenceState],
    waiting: Sequence[SequenceState],
    budget: StepBudget,
    room_for: Callable[[int], int],
) -> BatchChange:
    """Choose the sequences to preempt, or those to admit.

    Args:
        room_for: returns the cache tokens that a sequence of some length takes.
    """
    states = sorted(running, key=lambda state: state.arrival)
    needed = sum(room_for(state.length) for state in states)
    preempted = []
    while needed > budget.cache_tokens and len(states) > 1:
        youngest = states.pop()
        needed -= room_for(youngest.length)
        preempted.append(youngest.id)
    if preempted:
        return BatchChange(tuple(preempted), ())
    admitted: list[str] = []
    for state in sorted(waiting, key=lambda state: state.arrival):
        if not state.ready:
            continue  # later ones may pass it
        needed += room_for(state.length)
        if len(states) + len(admitted) >= budget.num_seqs or (needed > budget.cache_tokens and (states or admitted)):
            break  # smaller ones may not pass it
        admitted.append(state.id)
    return BatchChange((), tuple(admitted))


def schedule(running: Sequence[SequenceState], budget: StepBudget) -> tuple[ScheduledChunk, ...]:
    """Choose the tokens that a step computes."""
    states = sorted(running, key=lambda state: state.arrival)
    left_to_score = MOST_SCORED
    left = budget.batched_tokens - sum(state.length - state.cached == 1 for state in states)
    chunks = []
    for state in states:
        pending = state.length - state.cached
        wanted = min((at for at in state.stops if at > state.cached), default=state.length) - state.cached
        count = wanted if pending == 1 or (state.whole and state.cached == 0 and left > 0) else min(wanted, left)
        if state.scored:
            count = min(count, left_to_score)
            left_to_score -= count
        if pending > 1:
            left -= count
        if count > 0:
            chunks.append(ScheduledChunk(state.id, state.cached, count, predicts=state.predicts and count == pending))
    return tuple(chunks)


def halve(chunks: Sequence[ScheduledChunk]) -> tuple[ScheduledChunk, ...]:
    """Keep the first half of a step's chunks, or of a single chunk the first half of its tokens."""
    if len(chunks) > 1:
        return tuple(chunks[: len(chunks) // 2])
    (only,) = chunks
    return (replace(only, count=only.count // 2, predicts=False),)
