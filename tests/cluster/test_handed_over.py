"""A study with what users bring: searcher, scheduler, metric and rows as objects, also when it is resumed."""

from __future__ import annotations

import runpy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rankloom as rl
from rankloom.events import Event

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def make_study(tiny_llama: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a study's settings over the embedded rows; keywords replace whole sections."""
    trial = {
        "model": {"id": str(tiny_llama)},
        "data": {"max_train_rows": 48, "template": "plain"},
        "optim": {"learning_rate": 3e-3, "batch_size": 8},
        "budget": {"steps": 6},
        "eval": {"every": 3, "max_rows": 12, "max_test_rows": 12, "latency": False},
        "compute": {"num_workers": 1, "device": "cpu", "cpus_per_worker": 1},
        "output": {"root": str(tmp_path)},
    }

    def make(**changed: Any) -> dict[str, Any]:
        return {
            "name": "own",
            "trial": trial,
            "space": [{"method": {"type": "lora"}, "optim": {"learning_rate": {"loguniform": [1e-3, 1e-2]}}}],
            "search": {"num_trials": 3},
            "hosts": {"num_slots": 2, "max_rank": 16},
            "final": {"top_k": 1},
        } | changed

    return make


def test_the_example_of_own_search_runs(make_study: Callable[..., dict[str, Any]]) -> None:
    found = runpy.run_path(str(EXAMPLES / "own_search.py"))["main"](make_study())
    assert found.status == "done"
    with pytest.raises(rl.ConfigError, match="hand the searcher, sampler, scheduler or metric over again"):
        rl.tune(make_study(), resume=True)


@pytest.mark.slow
def test_a_stopped_study_continues_with_its_objects_given_again(make_study: Callable[..., dict[str, Any]]) -> None:
    import optuna
    from ray.tune.schedulers import ASHAScheduler

    rows = runpy.run_path(str(EXAMPLES / "own_data.py"))["ROWS"]
    longest = len(rows)
    study = make_study(name="judged")

    def judge(predictions: Any) -> float:
        return float(len(predictions)) / longest

    def tune(**options: Any) -> rl.StudyResult:
        sampler, scheduler = optuna.samplers.TPESampler(seed=1), ASHAScheduler(time_attr="percent", max_t=100)
        return rl.tune(study, data=rows, metric=judge, sampler=sampler, scheduler=scheduler, **options)

    stop, evaluated = threading.Event(), set()

    def stop_soon(event: Event) -> None:
        if isinstance(event, rl.TrialEvaluated):
            evaluated.add(event.trial)
            stop.set()

    assert tune(on_event=stop_soon, stop=stop).status == "interrupted"
    judged = tune(resume=True)
    assert judged.status == "done"
    assert evaluated <= set(judged.trials["trial"])
    assert set(judged.trials["best_metric"]) == {12 / longest}
    assert judged.winner.scorecard.result.metric.name.startswith("python:")
