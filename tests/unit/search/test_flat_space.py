"""Searchers and schedulers without a cluster: what is proposed, refused, counted, saved and restored."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from rankloom.config import StudyConfig, parse
from rankloom.errors import ConfigError
from rankloom.search import flat_space
from rankloom.search.schedulers import build_scheduler
from rankloom.search.tune_searcher import StudySearcher, draw_population

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
    found = [flat_space.sample(config, rng) for _ in range(300)]
    lora = [p for p in found if p["branch"] == 0]
    assert 100 < len(lora) < 200
    assert {p["optim.batch_size"] for p in lora} == {2, 3, 4}
    rates = sorted(p["optim.learning_rate"] for p in lora)
    assert rates[0] >= 1e-4
    assert rates[-1] <= 1e-2
    assert 5e-4 < rates[len(rates) // 2] < 2e-3  # as many below 1e-3 as above
    assert all("optim.learning_rate" not in p for p in found if p["branch"] == 1)


@pytest.mark.parametrize("algorithm", ["random", "optuna", "hyperopt", "nevergrad"])
def test_incompatible_points_are_refused_and_counted(algorithm: str) -> None:
    config = study(search={"algorithm": algorithm, "num_trials": 40})
    searcher = StudySearcher(config)
    found = []
    for i in range(40):
        found += points(searcher, 1)
        searcher.on_trial_complete("t0", {"best_value": 1 / (i + 1)})
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
    impossible = [{"method": {"type": "galore"}, "quantization": "nf4"}]
    searcher = StudySearcher(study(search={"num_trials": 10}).model_copy(update={"space": impossible}))
    searcher._sampler._first = []  # type: ignore[attr-defined]
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


@pytest.mark.parametrize("algorithm", ["random", "grid", "optuna", "hyperopt", "nevergrad"])
def test_a_restored_searcher_goes_on_as_if_nothing_had_happened(algorithm: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("algorithm", ["optuna", "hyperopt", "nevergrad"])
def test_a_searcher_learns_where_the_metric_is_good(algorithm: str) -> None:
    config = study(
        space=[{"optim": {"learning_rate": {"loguniform": [1e-6, 1e-1]}}}],
        search={"algorithm": algorithm, "num_trials": 60},
    )
    searcher = StudySearcher(config)
    distances = []
    for i in range(60):
        rate = searcher.suggest(f"t{i}").get("optim.learning_rate", 3e-4)
        distances.append(abs(math.log10(rate / 3e-2)))
        searcher.on_trial_complete(f"t{i}", {"best_value": distances[-1]})
    assert statistics.median(distances[-20:]) < 1.2  # a random searcher: 2.0 to 2.6


def test_a_failed_trial_is_told_as_bad_as_the_worst() -> None:
    config = study(space=SPACE[:1], search={"algorithm": "optuna", "num_trials": 9})
    searcher = StudySearcher(config)
    points(searcher, 5)
    searcher.on_trial_complete("t1", {"best_value": None, "error": "diverged"})  # before there is anything to compare
    for trial, value in (("t2", 0.5), ("t3", 0.7)):
        searcher.on_trial_complete(trial, {"best_value": value})
    searcher.on_trial_complete("t4", error=True)
    trials = searcher._sampler._optuna.trials  # type: ignore[attr-defined]
    assert [(trial.state.name, trial.value) for trial in trials] == [
        ("FAIL", None), ("COMPLETE", 0.5), ("COMPLETE", 0.7), ("COMPLETE", 0.7),
    ]  # fmt: skip


def test_bayesopt_takes_uniform_knobs_alone() -> None:
    rates = {"optim": {"learning_rate": {"uniform": [0.001, 0.1]}, "weight_decay": {"uniform": [0, 1]}}}
    searcher = StudySearcher(study(space=[rates], search={"algorithm": "bayesopt", "num_trials": 20, "seed": 3}))
    found = []
    for i in range(20):
        point = searcher.suggest(f"t{i}")
        found.append(point.get("optim.learning_rate", 0.1))
        searcher.on_trial_complete(f"t{i}", {"best_value": abs(found[-1] - 0.03)})
    assert min(abs(rate - 0.03) for rate in found) < 0.003
    with pytest.raises(ConfigError, match=r"search\.algorithm=bayesopt can't search this space: .*Categorical"):
        StudySearcher(study(search={"algorithm": "bayesopt"}))


def test_a_searcher_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for algorithm, package in (("nevergrad", "nevergrad"), ("hyperopt", "hyperopt"), ("bayesopt", "bayesian-")):
        with pytest.raises(ConfigError, match=f"search.algorithm={algorithm} needs another package: .*{package}"):
            StudySearcher(study(search={"algorithm": algorithm}))


def test_a_searcher_that_waits_while_nothing_runs_is_at_its_end() -> None:
    searcher = StudySearcher(study(search={"num_trials": 10}))
    searcher._sampler.ask = lambda _: None  # type: ignore[method-assign]
    assert "warm_start" in searcher.suggest("t0")
    assert searcher.suggest("t1") is None  # until t0 has ended
    searcher.on_trial_complete("t0", {"best_value": 1.0})
    assert searcher.suggest("t1") == Searcher.FINISHED


def test_optuna_searches_for_the_whole_front() -> None:
    """Two optima, of the metric and of the latency: single-objective TPE would leave the second alone."""
    search = {"algorithm": "optuna", "num_trials": 80, "objectives": ["latency_ms"]}
    config = study(space=[{"method": {"type": "lora", "rank": {"randint": [1, 512]}}}], search=search)
    searcher = StudySearcher(config)
    ranks = []
    for i in range(80):
        rank = searcher.suggest(f"t{i}").get("method.rank", 16)
        ranks.append(rank)
        # nothing between 100 and 400 is on the front
        worse = 500.0 if 100 < rank < 400 else 0.0
        result = {"best_value": -rank + worse, "latency_ms": rank + worse, "memory_bytes": None}
        searcher.on_trial_complete(f"t{i}", result)
    assert sum(not 100 < rank < 400 for rank in ranks[-40:]) > 28  # a random searcher: 16
    assert min(ranks[-40:]) < 50
    assert max(ranks[-40:]) > 450
    searcher = StudySearcher(config)
    points(searcher, 3)
    searcher.on_trial_complete("t1", {"best_value": 0.5, "latency_ms": None})  # stopped before it was measured
    searcher.on_trial_complete("t2", {"best_value": 0.5, "latency_ms": 2.0})
    trials = searcher._sampler._optuna.trials  # type: ignore[attr-defined]
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE"]
    assert trials[1].values == [0.5, 2.0]
    assert searcher._worst == [0.5, 2.0]


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
    found = [spec["config"] for _, spec in generate_variants({"config": draw_population(config)})]
    assert found == points(StudySearcher(config), 5)


def test_pbt_needs_something_to_change() -> None:
    with pytest.raises(ConfigError, match=r"pbt changes optim\.learning_rate"):
        build_scheduler(
            study(space=[{"method": {"type": "lora", "rank": {"choice": [1, 2]}}}], scheduler={"type": "pbt"})
        )
