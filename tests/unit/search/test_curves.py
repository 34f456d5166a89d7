"""What trackers get of a study: a run for each trial, grouped by the study's own."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from rankloom.config import StudyConfig, parse
from rankloom.errors import ConfigError
from rankloom.events import Event, FinalistScored, StudyFinished, TrialEnded, TrialEvaluated, TrialStarted, TrialStatus
from rankloom.search.curves import track_study
from rankloom.search.leaderboard import Leaderboard

LORA = {"branch": 0, "method.rank": 4}
SCORECARD = {"result": {"loss": 0.5, "accuracy": {"value": 0.75}}, "base": {"loss": 2.0, "accuracy": None}}


def study(**tracking: str) -> StudyConfig:
    tree = {"name": "s", "trial": {"tracking": tracking}, "space": [{"method": {"rank": {"choice": [4, 8]}}}]}
    return parse(StudyConfig, tree)


def begin(number: int) -> Event:
    return TrialStarted(trial=f"t{number}", point={"number": number, "refused": 0, **LORA})


def report(number: int, n: int, loss: float) -> Event:
    values = {"step": 10 * n, "percent": 25.0 * n, "loss": loss, "accuracy": None, "train_loss": loss + 1}
    return TrialEvaluated(trial=f"t{number}", n=n, **values, tokens=100 * n, train_s=0.5 * n)  # type: ignore[arg-type]


def end(number: int, status: TrialStatus) -> Event:
    return TrialEnded(trial=f"t{number}", status=status)


def done(number: int) -> Event:
    best = FinalistScored(trial=f"t{number}", name="s", method="lora", step=20, scorecard=SCORECARD, published=[])
    return StudyFinished(name="s", study="s", winner=best, finalists=[best])


FIRST = [
    begin(0), begin(1), report(0, 1, 3.0), report(1, 1, 2.5), report(0, 2, 2.0), end(1, "stopped"),
    report(0, 3, 9.0), report(0, 3, 1.5), Leaderboard(study()).build_status(),
]  # fmt: skip
THEN = [begin(0), report(0, 3, 1.25), report(0, 4, 1.0), end(0, "done"), done(0)]


def take(config: StudyConfig, leaderboard: Leaderboard, folder: Path, events: Iterable[Event]) -> None:
    with track_study(config, "id", leaderboard, folder) as track:
        for event in events:
            leaderboard.add(event)
            track(event)


def test_each_trial_has_its_curves_where_tensorboard_reads_them_and_a_resumed_study_goes_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curve(place: str, name: str) -> list[tuple[int, float]]:
        read = EventAccumulator(str(tmp_path / "tensorboard" / place)).Reload()
        return [(point.step, point.value) for point in read.Scalars(name)]

    config = study()
    leaderboard = Leaderboard(config)
    take(config, leaderboard, tmp_path, FIRST)
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which have the second and then a count
    take(config, leaderboard, tmp_path, THEN)  # report 3 comes again: it had not been saved
    assert curve("s-0000", "eval/loss") == [(10, 3.0), (20, 2.0), (30, 1.25), (40, 1.0)]
    assert curve("s-0000", "train/loss")[0] == (10, 4.0)
    assert curve("s-0000", "result/accuracy") == [(20, 0.75)]
    assert curve("s-0001", "eval/loss") == [(10, 2.5)]
    assert curve("", "study/best") == [(1, 2.0), (2, 1.0)]
    assert curve("", "study/tokens") == [(1, 300.0), (2, 500.0)]
    assert curve("", "base/loss") == [(2, 2.0)]


def test_trials_are_nested_in_the_studys_run_in_mlflow(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = study(mlflow=uri)
    leaderboard = Leaderboard(config)
    take(config, leaderboard, tmp_path, FIRST)
    client = tracking.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("rankloom").experiment_id

    def runs() -> dict[str, Any]:
        return {run.info.run_name: run for run in client.search_runs([experiment])}

    assert {name: run.info.status for name, run in runs().items()} == {
        "s": "KILLED", "s-0000": "KILLED", "s-0001": "FINISHED",
    }  # fmt: skip
    take(config, leaderboard, tmp_path, THEN)
    found = runs()
    assert {name: run.info.status for name, run in found.items()} == dict.fromkeys(
        ("s", "s-0000", "s-0001"), "FINISHED"
    )
    assert found["s-0000"].data.tags["mlflow.parentRunId"] == found["s"].info.run_id
    assert found["s-0000"].data.params["method.rank"] == "4"
    assert found["s"].data.metrics["study/best"] == found["s-0000"].data.metrics["eval/loss"] == 1.0
    assert [point.step for point in client.get_metric_history(found["s-0000"].info.run_id, "eval/loss")][-1] == 40


def test_a_server_that_is_not_there_ends_a_study_before_it_starts(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    config = study(mlflow="no-such-store://somewhere")
    with pytest.raises(ConfigError, match="tracking: "), track_study(config, "id", Leaderboard(config), tmp_path):
        pass
