"""Searchers and schedulers without a cluster: what is proposed, refused, counted, saved and restored."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from rankloom.config import StudyConfig, parse
from rankloom.errors import ConfigError
from rankloom.search import space
from rankloom.search.schedulers import build_scheduler
from rankloom.search.searchers import StudySearcher, population

SPACE = [
    {
        "method": {
            "type": "lora", "rank": {"choice": [4, 8]}, "target_modules": {"choice": ["all-linear", ["q_proj"]]},
        },
        "optim": {"learning_rate": {"loguniform": [1e-4, 1e-2]}, "batch_size": {"randint": [2, 4]}},
    },
    {
        "method": {"type": "galore"},
        "quantization": {"choice": ["none", "nf4"]},
        "optim": {"eps": {"uniform": [1e-9, 1e-8]}},
    },
]  # fmt: skip


def study(**changed: Any) -> StudyConfig:
    return parse(StudyConfig, {"name": "s", "space": SPACE} | changed)


def points(searcher: StudySearcher, count: int) -> list[dict[str, Any]]:
    found = []
    for i in range(count):
        point = searcher.suggest(f"t{i}")
        assert isinstance(point, dict)
        found.append(point)
    return found


def test_sampled_points_lie_in_the_space() -> None:
    config, rng = study(), random.Random(0)
    found = [space.sample(config, rng) for _ in range(300)]
    lora = [p for p in found if p["branch"] == 0]
    assert 100 < len(lora) < 200
    assert {p["optim.batch_size"] for p in lora} == {2, 3, 4}
    rates = sorted(p["optim.learning_rate"] for p in lora)
    assert rates[0] >= 1e-4
    assert rates[-1] <= 1e-2
    assert 5e-4 < rates[len(rates) // 2] < 2e-3  # as many below 1e-3 as above
    assert all("optim.learning_rate" not in p for p in found if p["branch"] == 1)


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_incompatible_points_are_refused_and_counted(algorithm: str) -> None:
    if algorithm == "optuna":
        pytest.importorskip("optuna")
    config = study(search={"algorithm": algorithm, "num_trials": 40})
    searcher = StudySearcher(config)
    found = points(searcher, 40)
    assert searcher.suggest("more") == Searcher.FINISHED
    assert [p["number"] for p in found] == list(range(40))
    for point in found:
        config.resolve(point, point["number"])
    assert {p.get("branch") for p in found} == {None, 0, 1}
    assert searcher.refusals
    assert "galore" in searcher.refusals[0]
    assert any(p.get("method.target_modules") == ["q_proj"] for p in found)


def test_a_space_of_nothing_but_refusals_ends_the_search() -> None:
    # each end of each knob is possible beside the others' first values, yet hardly anything else is
    searcher = StudySearcher(study(search={"num_trials": 10}))
    searcher._study.__dict__["space"] = [{"method": {"type": "galore"}, "quantization": "nf4"}]
    assert isinstance(searcher.suggest("t0"), dict)  # the warm start
    assert searcher.suggest("t1") == Searcher.FINISHED
    assert len(searcher.refusals) == 200


def test_warm_starts_come_first_and_grid_is_whole() -> None:
    warm = [{"method": {"type": "lora", "rank": r}} for r in (2, 3)]
    branch = {"seed": {"choice": [1, 2, 3]}, "method": {"type": "lora", "rank": {"randint": [5, 6]}}}
    searcher = StudySearcher(study(space=[branch], search={"algorithm": "grid", "warm_start": warm}))
    found = points(searcher, 8)
    assert [p.get("warm_start") for p in found[:3]] == [0, 1, None]
    assert {(p["seed"], p["method.rank"]) for p in found[2:]} == {(s, r) for s in (1, 2, 3) for r in (5, 6)}
    assert searcher.suggest("more") == Searcher.FINISHED


@pytest.mark.parametrize("algorithm", ["random", "grid", "optuna"])
def test_a_restored_searcher_goes_on_as_if_nothing_had_happened(algorithm: str, tmp_path: Path) -> None:
    if algorithm == "optuna":
        pytest.importorskip("optuna")
    config = study(
        space=[{"seed": {"choice": list(range(30))}, "method": {"type": "lora", "rank": {"randint": [1, 9]}}}],
        search={"algorithm": algorithm, "num_trials": 30},
    )
    first = StudySearcher(config)
    for i in range(12):
        first.suggest(f"t{i}")
        first.on_trial_complete(f"t{i}", {"best_value": 1 / (i + 1)})
    first.save(str(tmp_path / "state"))
    second = StudySearcher(config)
    second.restore(str(tmp_path / "state"))
    assert points(first, 5) == points(second, 5)


def test_tpe_learns_where_the_metric_is_good() -> None:
    pytest.importorskip("optuna")
    config = study(
        space=[{"optim": {"learning_rate": {"loguniform": [1e-6, 1e-1]}}}],
        search={"algorithm": "optuna", "num_trials": 60},
    )
    searcher = StudySearcher(config)
    rates = []
    for i in range(60):
        rate = searcher.suggest(f"t{i}").get("optim.learning_rate")
        if rate is not None:
            rates.append(rate)
        searcher.on_trial_complete(f"t{i}", {"best_value": 0.0 if rate is not None and rate > 1e-2 else 1.0})
    assert sum(rate > 1e-2 for rate in rates[-20:]) > 12  # a random searcher: 4


def test_a_failed_trial_is_told_as_failed() -> None:
    pytest.importorskip("optuna")
    searcher = StudySearcher(study(search={"algorithm": "optuna", "num_trials": 9}))
    points(searcher, 3)
    searcher.on_trial_complete("t1", {"best_value": None, "error": "diverged"})
    searcher.on_trial_complete("t2", {"best_value": 0.5})
    trials = searcher._proposer._search._ot_study.trials  # type: ignore[attr-defined]
    refused = len(searcher.refusals)
    assert sum(t.state.name == "FAIL" for t in trials) == refused + 1
    assert [t.value for t in trials if t.state.name == "COMPLETE"] == [0.5]


@pytest.mark.parametrize("kind", ["fifo", "asha", "hyperband", "median", "pbt"])
def test_every_scheduler_is_built(kind: str) -> None:
    scheduler = build_scheduler(study(space=SPACE[:1], scheduler={"type": kind}))
    assert scheduler.set_search_properties("loss", "min")


def test_asha_rungs_are_shares_of_the_budget() -> None:
    scheduler = build_scheduler(study(scheduler={"type": "asha", "grace": 0.1}))
    assert [rung for rung, _ in scheduler._brackets[0]._rungs] == [90, 30, 10]


def test_a_population_holds_the_searchers_points() -> None:
    from ray.tune.search.variant_generator import generate_variants

    config = study(space=SPACE[:1], scheduler={"type": "pbt"}, search={"num_trials": 5})
    found = [spec["config"] for _, spec in generate_variants({"config": population(config)})]
    assert found == points(StudySearcher(config), 5)


def test_pbt_needs_something_to_change() -> None:
    with pytest.raises(ConfigError, match=r"pbt changes optim\.learning_rate"):
        build_scheduler(
            study(space=[{"method": {"type": "lora", "rank": {"choice": [1, 2]}}}], scheduler={"type": "pbt"})
        )
