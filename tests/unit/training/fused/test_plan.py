"""What the host computes together, decided without a model."""

from __future__ import annotations

import pytest

from rankloom.training.fused.plan import PendingBatch, StepPlan, plan_step


def taken(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    return [] if plan is None else [(s.slot, s.start, s.stop) for s in plan.shares]


def test_no_work_is_no_plan() -> None:
    assert plan_step([], 100) is None


def test_everyone_who_fits_is_in_it_and_ordered_by_slot() -> None:
    work = [PendingBatch(3, 5, (10, 20)), PendingBatch(0, 7, (5,)), PendingBatch(1, 6, (30,))]
    plan = plan_step(work, 100)
    assert taken(plan) == [(0, 0, 1), (1, 0, 1), (3, 0, 2)]
    assert plan is not None
    assert plan.num_tokens == 65


def test_who_waited_longest_goes_first_and_small_ones_fill_the_rest() -> None:
    work = [PendingBatch(0, 9, (60,)), PendingBatch(1, 3, (60,)), PendingBatch(2, 8, (30,)), PendingBatch(3, 8, (30,))]
    assert taken(plan_step(work, 100)) == [(1, 0, 1), (2, 0, 1)]


def test_nobody_starves() -> None:
    last_served = dict.fromkeys(range(5), -1)
    lengths = {0: (90,), 1: (20, 20), 2: (50,), 3: (10,), 4: (70, 30)}
    served: dict[int, int] = dict.fromkeys(range(5), 0)
    for step in range(30):
        plan = plan_step([PendingBatch(s, last_served[s], lengths[s]) for s in range(5)], 100)
        assert plan is not None
        assert plan.num_tokens <= 100
        for share in plan.shares:
            last_served[share.slot] = step
            served[share.slot] += 1
    assert min(served.values()) >= 6


def test_a_micro_batch_above_the_budget_is_cut_and_a_row_above_it_goes_alone() -> None:
    assert taken(plan_step([PendingBatch(0, 0, (40, 40, 40))], 100)) == [(0, 0, 2)]
    assert taken(plan_step([PendingBatch(0, 0, (400, 40))], 100)) == [(0, 0, 1)]
    # only who is first is cut: another's turn comes
    assert taken(plan_step([PendingBatch(0, 0, (40,)), PendingBatch(1, 1, (90, 90))], 100)) == [(0, 0, 1)]


def test_padding_counts_where_rows_are_padded() -> None:
    work = [PendingBatch(0, 0, (10, 10)), PendingBatch(1, 0, (40,))]
    assert len(taken(plan_step(work, 60))) == 2
    assert taken(plan_step(work, 60, padded=True)) == [(0, 0, 2)]
    plan = plan_step(work, 120, padded=True)
    assert plan is not None
    assert plan.num_tokens == 120


def test_halves_do_the_same_together() -> None:
    plan = plan_step([PendingBatch(s, 0, (10 + s, 5)) for s in range(3)], 1000)
    todo, rows = [plan], []
    while todo:
        part = todo.pop()
        assert part is not None
        halves = part.split()
        if halves is None:
            (share,) = part.shares
            assert part.num_tokens == sum(share.lengths)
            rows.append((share.slot, share.start, share.stop, share.lengths))
        else:
            todo += halves
    assert sorted(rows) == sorted((s, i, i + 1, ((10 + s, 5)[i],)) for s in range(3) for i in range(2))


@pytest.mark.parametrize("padded", [False, True])
def test_a_cut_never_takes_more_than_the_budget(padded: bool) -> None:
    for budget in range(1, 120):
        plan = plan_step([PendingBatch(0, 0, (7, 30, 12, 45, 3))], budget, padded=padded)
        assert plan is not None
        assert plan.num_tokens <= budget or len(plan.shares[0].lengths) == 1
