"""The scheduler's decisions: order, budgets, preemption, chunks."""

from __future__ import annotations

import pytest

from rankloom.engine import scheduler
from rankloom.engine.scheduler import ScheduledChunk, SequenceState, StepBudget, change_batch, schedule

BUDGET = StepBudget(num_seqs=3, cache_tokens=100, batched_tokens=10)


def rows(*lengths: int, cached: int = 0) -> list[SequenceState]:
    return [SequenceState(f"r{i}", i, length, cached) for i, length in enumerate(lengths)]


def same(length: int) -> int:
    return length


def test_first_come_first_served() -> None:
    waiting = rows(5, 5, 5, 5)
    assert change_batch([], waiting[::-1], BUDGET, same).admitted == ("r0", "r1", "r2")


def test_a_small_request_does_not_overtake_one_that_waits_for_room() -> None:
    running, (first, second) = rows(60), [SequenceState("big", 1, 60), SequenceState("small", 2, 5)]
    assert change_batch(running, [second, first], BUDGET, same).admitted == ()


def test_a_prompt_that_is_scored_takes_a_bounded_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MOST_SCORED", 4)
    states = [SequenceState(f"r{i}", i, 7, predicts=i > 0, scored=i < 2) for i in range(3)]
    assert schedule(states, BUDGET) == (ScheduledChunk("r0", 0, 4, False), ScheduledChunk("r2", 0, 6, False))
    left = [SequenceState("r0", 0, 7, 4, predicts=False, scored=True), SequenceState("r1", 1, 7, scored=True)]
    assert schedule(left, BUDGET) == (ScheduledChunk("r0", 4, 3, False), ScheduledChunk("r1", 0, 1, False))


def test_who_waits_for_an_adapter_holds_up_nobody() -> None:
    waiting = [SequenceState("cold", 0, 5, ready=False), SequenceState("warm", 1, 5)]
    assert change_batch([], waiting, BUDGET, same).admitted == ("warm",)


def test_the_youngest_gives_its_place_up_and_nobody_joins() -> None:
    running = rows(40, 40, 40)
    decided = change_batch(running[::-1], [SequenceState("new", 9, 1)], BUDGET, same)
    assert decided.preempted == ("r2",)
    assert decided.admitted == ()


def test_one_row_alone_is_never_preempted() -> None:
    assert change_batch(rows(400), [], BUDGET, same).preempted == ()
    assert change_batch([], rows(400, 1), BUDGET, same).admitted == ("r0",)


def test_room_is_counted_as_the_cache_counts_it() -> None:
    assert change_batch([], rows(10, 10), BUDGET, lambda length: 6 * length).admitted == ("r0",)


def test_decoding_rows_go_first_and_prompts_share_the_rest() -> None:
    running = [
        SequenceState("a", 0, 30),
        SequenceState("b", 1, 9, 8),
        SequenceState("c", 2, 7, 6),
        SequenceState("d", 3, 4),
    ]
    assert schedule(running, BUDGET) == (
        ScheduledChunk("a", 0, 8, predicts=False),
        ScheduledChunk("b", 8, 1, predicts=True),
        ScheduledChunk("c", 6, 1, predicts=True),
    )


def test_a_prompt_that_fits_predicts_and_leaves_room_for_the_next() -> None:
    running = [SequenceState("a", 0, 30, 26), SequenceState("b", 1, 20)]
    assert schedule(running, BUDGET) == (
        ScheduledChunk("a", 26, 4, predicts=True),
        ScheduledChunk("b", 0, 6, predicts=False),
    )


def test_chunks_end_where_states_are_kept() -> None:
    def cut(cached: int) -> list[tuple[int, bool]]:
        chunks = schedule([SequenceState("a", 0, 9, cached, stops=(4, 8))], BUDGET)
        return [(chunk.count, chunk.predicts) for chunk in chunks]

    assert [cut(0), cut(2), cut(4), cut(8)] == [[(4, False)], [(2, False)], [(4, False)], [(1, True)]]


def test_the_first_chunk_of_what_can_not_be_continued_is_whole() -> None:
    running = [SequenceState("a", 0, 40, whole=True), SequenceState("b", 1, 40, whole=True)]
    assert schedule(running, BUDGET) == (ScheduledChunk("a", 0, 40, predicts=True),)  # the other one waits
    after = [SequenceState("a", 0, 41, 40, whole=True), SequenceState("b", 1, 40, 20, whole=True)]
    assert [chunk.count for chunk in schedule(after, BUDGET)] == [1, 9]
