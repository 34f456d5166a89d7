"""Where a run's events go, in the driver: events.jsonl and TensorBoard always, MLflow and W&B where configured.

A tracker that fails while the run is under way is dropped with a warning; a missing package is found before the
start. A step that was repeated after a worker died is written twice; the later one counts.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rankloom.config import TrialConfig, dump
from rankloom.errors import ConfigError, TrialError
from rankloom.launch.run_folder import CURVES, EVENTS, RunFolder, flat

Event = dict[str, Any]
logger = logging.getLogger(__name__)

MLFLOW_EXPERIMENT = "rankloom"
_MEASURES = ("loss", "perplexity", "macro_f1", "retention_loss", "latency_ms", "generated_tokens_per_s")
_STEP = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "memory_bytes", "epoch")


class Tracker(Protocol):
    """One place that events are written to."""

    def write(self, event: Event) -> None: ...

    def close(self, status: str) -> None:
        """`status`: done, interrupted or failed."""


def check(trial: TrialConfig) -> None:
    """Raises ConfigError where a configured tracker's package is not installed."""
    wanted = {"mlflow": trial.tracking.mlflow, "wandb": trial.tracking.wandb_project}
    for package, value in wanted.items():
        if value is not None and find_spec(package) is None:
            key = "tracking.mlflow" if package == "mlflow" else "tracking.wandb_project"
            raise ConfigError(
                f"{key}={value}: {package} is not installed; pip install 'rankloom[{package}]', or remove the setting"
            )


@contextmanager
def tracked(trial: TrialConfig, run: RunFolder) -> Iterator[Callable[[Event], None]]:
    """Yields the function that writes an event to every tracker of the trial.

    Raises:
        TrialError: the run's folder can't be written. ConfigError: a configured tracker does not open.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(run.scratch())
        try:
            trackers: list[Tracker] = [Jsonl(folder / EVENTS), TensorBoard(folder / CURVES)]
        except OSError as error:
            raise TrialError(f"output.root: {folder} can't be written: {error}; make room, or choose another") from None
        try:
            if trial.tracking.mlflow is not None:
                trackers.append(Mlflow(trial, run.id))
            if trial.tracking.wandb_project is not None:
                trackers.append(WandB(trial, run.id, folder))
        except Exception as error:  # their clients raise of everything
            raise ConfigError(f"tracking: {type(error).__name__}: {' '.join(str(error).split())}") from error
        status = "failed"

        def write(event: Event) -> None:
            nonlocal status
            if event["event"] == "done":
                status = event["status"]
            for tracker in list(trackers):
                try:
                    tracker.write(event)
                except Exception as error:  # a full disk or a server that went away must not end the training
                    trackers.remove(tracker)
                    logger.warning("%s stopped recording: %s", type(tracker).__name__, error)

        try:
            yield write
        finally:
            for tracker in trackers:
                try:
                    tracker.close(status)
                except Exception as error:
                    logger.warning("%s: %s", type(tracker).__name__, error)


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event that are worth a curve, by name."""
    if event["event"] == "step":
        found = {f"train/{key}": event[key] for key in _STEP}
    elif event["event"] == "eval":
        found = {f"eval/{key}": event[key] for key in ("loss", "accuracy")}
    elif event["event"] == "done" and event.get("scorecard"):
        found = {}
        for side in ("result", "base"):
            measures = event["scorecard"][side] or {}
            found |= {f"{side}/{key}": measures.get(key) for key in _MEASURES}
            for key in ("accuracy", "exact_match"):
                found[f"{side}/{key}"] = (measures.get(key) or {}).get("value")
    else:
        return {}
    return {key: float(value) for key, value in found.items() if value is not None}


def _step(event: Event) -> int:
    return int(event["steps"] if event["event"] == "done" else event["step"])


class Jsonl:
    """Every event, a line each, with its time."""

    def __init__(self, file: Path) -> None:
        self._opened = file.open("a", encoding="utf-8", buffering=1)

    def write(self, event: Event) -> None:
        self._opened.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")

    def close(self, status: str) -> None:
        self._opened.close()


class TensorBoard:
    """Curves, through tensorboard's own writer, which needs no torch."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))

    def write(self, event: Event) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Entry
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        if event["event"] == "resumed":  # tells TensorBoard to forget the steps that are now repeated
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Entry(wall_time=time.time(), step=event["step"] + 1, session_log=start))
        if values := scalars(event):
            summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
            self._writer.add_event(Entry(wall_time=time.time(), step=_step(event), summary=summary))

    def close(self, status: str) -> None:
        self._writer.close()


class Mlflow:
    """An MLflow run, found again by the run's id when it is resumed. Through the client: no module state."""

    def __init__(self, trial: TrialConfig, run_id: str) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=trial.tracking.mlflow)
        found = self._client.get_experiment_by_name(MLFLOW_EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(MLFLOW_EXPERIMENT)
        runs = self._client.search_runs([experiment], f"tags.rankloom_id = '{run_id}'")
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        created = self._client.create_run(experiment, tags={"rankloom_id": run_id}, run_name=trial.name)
        self._run = created.info.run_id
        for key, value in flat(dump(trial)).items():
            self._client.log_param(self._run, key, value)

    def write(self, event: Event) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        if metrics := [Metric(key, value, now, _step(event)) for key, value in scalars(event).items()]:
            self._client.log_batch(self._run, metrics=metrics)

    def close(self, status: str) -> None:
        self._client.set_terminated(self._run, {"done": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED"))


class WandB:
    """A Weights & Biases run, continued by the run's id when it is resumed."""

    def __init__(self, trial: TrialConfig, run_id: str, folder: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=trial.tracking.wandb_project,
            name=trial.name,
            id=run_id,
            resume="allow",
            config=dump(trial),
            dir=folder,
            settings=wandb.Settings(silent=True),
        )

    def write(self, event: Event) -> None:
        if values := scalars(event):
            self._run.log(values, step=_step(event))

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "done" else 1)
