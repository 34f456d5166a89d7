"""Where events go: events.jsonl, TensorBoard's own file format, and what is missing is found before the start."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from rankloom.config import TrialConfig, parse
from rankloom.config.paths import resolve_paths
from rankloom.errors import ConfigError
from rankloom.events import Evaluated, PhaseStarted, RunFinished, RunResumed, StepFinished
from rankloom.launch.run_folder import RunFolder
from rankloom.launch.tracking import check, list_scalars, track_run

STEP = StepFinished(
    step=1, total_steps=2, epoch=0.5, loss=2.0, learning_rate=1e-3, grad_norm=None,
    tokens_per_s=10.0, tokens=5, memory_bytes=100, eta_s=1.0,
)  # fmt: skip
MEASURES = {"num_rows": 2, "loss": 0.5, "perplexity": 1.6, "accuracy": {"value": 0.9, "low": 0.8, "high": 1.0}}
DONE = RunFinished(status="done", steps=2, scorecard={"result": MEASURES, "base": None})


def test_scalars_leave_out_what_was_not_measured() -> None:
    assert "train/grad_norm" not in list_scalars(STEP)
    assert list_scalars(STEP)["train/loss"] == 2.0
    assert list_scalars(Evaluated(step=1, loss=1.0, accuracy=None, best=True)) == {"eval/loss": 1.0}
    assert list_scalars(DONE) == {"result/loss": 0.5, "result/perplexity": 1.6, "result/accuracy": 0.9}
    assert list_scalars(PhaseStarted("data", "")) == {}


def test_events_are_written_where_tensorboard_reads_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trial = resolve_paths(parse(TrialConfig, {"name": "run", "output": {"root": str(tmp_path)}}))
    run = RunFolder(trial)
    run.begin(trial)
    with track_run(trial, run) as write:
        for step in (1, 2):
            write(replace(STEP, step=step, loss=3.0 - step))
    with track_run(trial, run) as write:  # a resumed run: step 2 is repeated
        write(RunResumed(1))
        write(replace(STEP, step=2, loss=0.25))
        write(DONE)
    folder = tmp_path / "runs" / "run"
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["step", "step", "resumed", "step", "done"]
    assert all(line["time"] > 1e9 and line["v"] == 1 for line in lines)
    curves = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in curves.Scalars("train/loss")] == [(1, 2.0), (2, 0.25)]
    assert curves.Scalars("result/accuracy")[0].value == pytest.approx(0.9)


@pytest.mark.parametrize(("key", "package"), [("mlflow", "mlflow"), ("wandb_project", "wandb")])
def test_a_missing_package_is_found_before_the_start(key: str, package: str) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    trial = parse(TrialConfig, {"name": "run", "tracking": {key: "somewhere"}})
    with pytest.raises(
        ConfigError, match=rf"tracking\.{key}=somewhere: {package} is not installed; .*rankloom\[{package}\]"
    ):
        check(trial)
