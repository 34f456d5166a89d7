"""The scheduler's decisions: order, budgets, preemption, chunks."""

from __future__ import annotations

from rankloom.engine.scheduler import Budget, Portion, Seat, portion, seat

BUDGET = Budget(rows=3, cache_tokens=100, step_tokens=10)


def rows(*lengths: int, cached: int = 0) -> list[Seat]:
    return [Seat(f"r{i}", i, length, cached) for i, length in enumerate(lengths)]


def same(length: int) -> int:
    return length


def test_first_come_first_served() -> None:
    waiting = rows(5, 5, 5, 5)
    assert seat([], waiting[::-1], BUDGET, same).admitted == ("r0", "r1", "r2")


def test_a_small_request_does_not_overtake_one_that_waits_for_room() -> None:
    running, (first, second) = rows(60), [Seat("big", 1, 60), Seat("small", 2, 5)]
    assert seat(running, [second, first], BUDGET, same).admitted == ()


def test_who_waits_for_an_adapter_holds_up_nobody() -> None:
    waiting = [Seat("cold", 0, 5, ready=False), Seat("warm", 1, 5)]
    assert seat([], waiting, BUDGET, same).admitted == ("warm",)


def test_the_youngest_gives_its_place_up_and_nobody_joins() -> None:
    running = rows(40, 40, 40)
    decided = seat(running[::-1], [Seat("new", 9, 1)], BUDGET, same)
    assert decided.preempted == ("r2",)
    assert decided.admitted == ()


def test_one_row_alone_is_never_preempted() -> None:
    assert seat(rows(400), [], BUDGET, same).preempted == ()
    assert seat([], rows(400, 1), BUDGET, same).admitted == ("r0",)


def test_room_is_counted_as_the_cache_counts_it() -> None:
    assert seat([], rows(10, 10), BUDGET, lambda length: 6 * length).admitted == ("r0",)


def test_decoding_rows_go_first_and_prompts_share_the_rest() -> None:
    running = [Seat("a", 0, 30), Seat("b", 1, 9, 8), Seat("c", 2, 7, 6), Seat("d", 3, 4)]
    assert portion(running, BUDGET) == (
        Portion("a", 0, 8, predicts=False),
        Portion("b", 8, 1, predicts=True),
        Portion("c", 6, 1, predicts=True),
    )


def test_a_prompt_that_fits_predicts_and_leaves_room_for_the_next() -> None:
    running = [Seat("a", 0, 30, 26), Seat("b", 1, 20)]
    assert portion(running, BUDGET) == (Portion("a", 26, 4, predicts=True), Portion("b", 0, 6, predicts=False))
