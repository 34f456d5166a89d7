"""Who trains in a host now: the pure decision."""

from __future__ import annotations

import math
import random
from statistics import fmean
from types import SimpleNamespace

import pytest

from rankloom.config import StudyConfig, parse
from rankloom.hosts.slots import Candidate, assign_slots
from rankloom.search.schedulers import PROGRESS, build_scheduler
from rankloom.search.tuning import count_live


def candidate(key: str, order: int, **changed: object) -> Candidate:
    return Candidate(key, order, **changed)  # type: ignore[arg-type]


def test_the_first_come_first_and_all_slots_are_filled() -> None:
    plan = assign_slots([candidate(k, i) for i, k in enumerate("abc")], num_slots=2, run_ahead=1)
    assert (plan.evict, plan.admit, plan.train) == ((), ("a", "b"), ("a", "b"))


def test_who_is_at_the_bound_gives_its_slot_to_who_waits() -> None:
    ahead = candidate("a", 0, made=2, accepted=0, seated=True)
    plan = assign_slots([ahead, candidate("b", 1)], num_slots=1, run_ahead=1)
    assert (plan.evict, plan.admit, plan.train) == (("a",), ("b",), ("b",))
    ahead.seated, ahead.accepted = False, 1  # its driver asked on
    plan = assign_slots([ahead, candidate("b", 1, seated=True)], num_slots=1, run_ahead=1)
    assert plan.train == ("b",)
    plan = assign_slots([ahead, candidate("b", 1, seated=True, finished=True)], num_slots=1, run_ahead=1)
    assert (plan.evict, plan.admit) == (("b",), ("a",))


def test_who_is_at_the_bound_keeps_its_slot_while_nobody_waits() -> None:
    ahead = candidate("a", 0, made=2, accepted=0, seated=True)
    plan = assign_slots([ahead, candidate("b", 1)], num_slots=2, run_ahead=1)
    assert (plan.evict, plan.admit, plan.train) == ((), ("b",), ("b",))


def test_who_is_behind_its_driver_comes_before_who_runs_ahead() -> None:
    runner, asked = candidate("a", 0, made=3, accepted=2), candidate("b", 1, made=2, accepted=2)
    assert assign_slots([runner, asked], num_slots=1, run_ahead=1).admit == ("b",)


def test_who_has_the_fewest_reports_comes_first_and_who_is_far_ahead_of_it_gives_way() -> None:
    old, middle = candidate("old", 0, made=5, accepted=5), candidate("middle", 1, made=3, accepted=3)
    new = candidate("new", 2)
    assert assign_slots([old, middle, new], num_slots=2, run_ahead=1).admit == ("new", "middle")
    old.seated = middle.seated = True
    assert assign_slots([old, middle, new], num_slots=2, run_ahead=1) == (("old",), ("new",), ("middle", "new"))
    old.at_report = False  # what it trained since would be lost
    assert assign_slots([old, middle, new], num_slots=2, run_ahead=1) == (("middle",), ("new",), ("old", "new"))
    new.made = new.accepted = 2  # not far behind the one, and the other is amid its work
    assert assign_slots([old, middle, new], num_slots=2, run_ahead=1) == ((), (), ("old", "middle"))


def test_without_running_ahead_a_member_waits_for_its_driver() -> None:
    assert assign_slots([candidate("a", 0, made=1, seated=True)], num_slots=1, run_ahead=0).train == ()
    assert assign_slots([candidate("a", 0, made=1, accepted=1, seated=True)], num_slots=1, run_ahead=0).train == ("a",)


def test_leaving_and_finished_members_go() -> None:
    candidates = [
        candidate("a", 0, seated=True, leaving=True),
        candidate("b", 1, seated=True, finished=True),
        candidate("c", 2, leaving=True),
    ]
    plan = assign_slots(candidates, num_slots=2, run_ahead=1)
    assert (plan.evict, plan.admit, plan.train) == (("a", "b"), (), ())


def test_never_more_than_the_slots_and_none_empty_while_somebody_waits() -> None:
    rng = random.Random(0)
    for _ in range(500):
        slots, run_ahead = rng.randint(1, 4), rng.randint(0, 2)
        candidates = []
        for order in range(rng.randint(0, 9)):
            accepted = rng.randint(0, 3)
            flags = {name: rng.random() < 0.2 for name in ("finished", "leaving")}
            made = accepted + rng.randint(0, run_ahead + 1)
            flags["at_report"] = made > accepted + run_ahead or rng.random() < 0.5
            candidates.append(candidate(str(order), order, accepted=accepted, made=made, **flags))
        for each in rng.sample(candidates, min(slots, len(candidates))):
            each.seated = True
        plan = assign_slots(candidates, slots, run_ahead)
        before = {s.key for s in candidates if s.seated}
        inside = before - set(plan.evict) | set(plan.admit)
        wanting = {s.key for s in candidates if s.wants(run_ahead)}
        assert set(plan.evict) <= before
        assert not set(plan.admit) & before
        assert set(plan.train) == inside & wanting
        assert len(plan.train) == min(slots, len(wanting))
        assert len(inside) <= slots


def occupancy(study: StudyConfig, seed: int) -> float:
    """Of a host's steps in a study with successive halving: no training, but the real decision and Ray Tune's own ASHA.

    A trial has 20 reports, one every 10 steps; its driver answers a step after a report. Losses are drawn.
    """
    asha = build_scheduler(study)
    asha.set_search_properties("loss", "min")
    rng, num_slots, most = random.Random(seed), 8, count_live(study, hosts_per_group=1, num_slots=8)
    quality = [rng.gauss(0, 1) for _ in range(study.num_trials)]
    speed = [rng.uniform(0.5, 2) for _ in range(study.num_trials)]
    todo, fill = list(range(study.num_trials)), []
    candidates: dict[str, Candidate] = {}
    trained: dict[str, int] = {}
    told: dict[str, int] = {}
    while todo or candidates:
        for number in [todo.pop(0) for _ in range(min(most - len(candidates), len(todo)))]:
            candidates[str(number)], trained[str(number)] = candidate(str(number), number), 0
            asha.on_trial_add(None, SimpleNamespace(trial_id=str(number)))
        for key, n in told.items():
            loss = quality[int(key)] + 3 * math.exp(-speed[int(key)] * n / 5) + rng.gauss(0, 0.05)
            result = {PROGRESS: 5 * n, "loss": loss}
            if asha.on_trial_result(None, SimpleNamespace(trial_id=key), result) == "STOP":
                candidates[key].leaving = True
            else:
                candidates[key].accepted = n
        plan = assign_slots(list(candidates.values()), num_slots, run_ahead=1)
        for key in plan.evict:
            candidates[key].seated = False
        for key in plan.admit:
            candidates[key].seated, trained[key] = True, 10 * candidates[key].made
        candidates = {key: each for key, each in candidates.items() if not each.leaving}
        for key in plan.train:
            trained[key] += 1
            candidates[key].at_report = trained[key] % 10 == 0
            candidates[key].made = trained[key] // 10
            candidates[key].finished = candidates[key].made == 20
        told = {key: each.accepted + 1 for key, each in candidates.items() if each.made > each.accepted}
        fill += [len(plan.train) / num_slots] if plan.train else []
    return sum(fill) / len(fill)


def test_over_a_whole_study_with_early_stopping_slots_are_full() -> None:
    study = {"name": "s", "space": [{"seed": {"randint": [0, 9]}}], "search": {"num_trials": 64}}
    asha = parse(StudyConfig, study | {"scheduler": {"type": "asha", "grace": 0.1}, "hosts": {"num_slots": 8}})
    assert fmean(occupancy(asha, seed) for seed in range(10)) >= 0.85


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 24),
        ({"hosts": {"num_waiting": 3}}, 11),
        ({"search": {"algorithm": "optuna", "num_trials": 64}}, 16),
        ({"scheduler": {"type": "hyperband"}}, 64),
        ({"space": [{"seed": {"randint": [0, 9]}}, {"method": {"type": "galore"}}]}, 12),
        ({"search": {"num_trials": 5}}, 5),
    ],
)
def test_how_many_trials_are_under_way(changed: dict[str, object], expected: int) -> None:
    study = {"name": "s", "space": [{"seed": {"randint": [0, 9]}}], "search": {"num_trials": 64}}
    assert count_live(parse(StudyConfig, study | changed), hosts_per_group=1, num_slots=8) == expected
