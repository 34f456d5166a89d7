"""Who gets a row, who gives one up, and which tokens a step computes: pure decisions, carried out by `engine.py`.

First come, first served. A row that decodes gets its token at every step, whatever prompts come in; prompts share what
is left of a step's tokens. Where rows outgrow the cache's budget it is the youngest that gives its place up, so that
the oldest always finishes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SequenceState:
    """A request as the scheduler sees it."""

    id: str
    arrival: int
    length: int
    """Tokens of prompt and completion so far."""
    cached: int = 0
    """Of these, the ones whose keys and values are there."""
    ready: bool = True
    """Whether its adapter is there."""


@dataclass(frozen=True)
class StepBudget:
    rows: int
    cache_tokens: int
    step_tokens: int


@dataclass(frozen=True)
class BatchChange:
    """Who leaves the batch, and then who joins it."""

    preempted: tuple[str, ...]
    admitted: tuple[str, ...]


@dataclass(frozen=True)
class ScheduledChunk:
    """A row's tokens in a step."""

    id: str
    start: int
    count: int
    predicts: bool
    """Whether these are all it has, so that the next one is chosen."""


def change_batch(
    running: Sequence[SequenceState],
    waiting: Sequence[SequenceState],
    budget: StepBudget,
    room_for: Callable[[int], int],
) -> BatchChange:
    """Args: room_for: the tokens of the budget that a row of a length takes."""
    rows = sorted(running, key=lambda row: row.arrival)
    needed = sum(room_for(row.length) for row in rows)
    preempted = []
    while needed > budget.cache_tokens and len(rows) > 1:
        youngest = rows.pop()
        needed -= room_for(youngest.length)
        preempted.append(youngest.id)
    if preempted:
        return BatchChange(tuple(preempted), ())
    admitted: list[str] = []
    for row in sorted(waiting, key=lambda row: row.arrival):
        if not row.ready:
            continue  # it holds up nobody
        needed += room_for(row.length)
        if len(rows) + len(admitted) >= budget.rows or (needed > budget.cache_tokens and (rows or admitted)):
            break  # nor is it overtaken by a smaller one
        admitted.append(row.id)
    return BatchChange((), tuple(admitted))


def schedule(running: Sequence[SequenceState], budget: StepBudget) -> tuple[ScheduledChunk, ...]:
    """What a step computes."""
    rows = sorted(running, key=lambda row: row.arrival)
    left = budget.step_tokens - sum(row.length - row.cached == 1 for row in rows)
    portions = []
    for row in rows:
        pending = row.length - row.cached
        count = pending if pending == 1 else min(pending, left)
        if pending > 1:
            left -= count
        if count > 0:
            portions.append(ScheduledChunk(row.id, row.cached, count, predicts=count == pending))
    return tuple(portions)


def halved(portions: Sequence[ScheduledChunk]) -> tuple[ScheduledChunk, ...]:
    """The first half of a step's rows; of a single row, the first half of its tokens."""
    if len(portions) > 1:
        return tuple(portions[: len(portions) // 2])
    (only,) = portions
    return (replace(only, count=only.count // 2, predicts=False),)
