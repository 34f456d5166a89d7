"""Trackers write a run's events in the driver: events.jsonl and TensorBoard always, MLflow and W&B where configured.

A tracker that fails during the run is dropped with a warning; a missing package is found before the start. A step
that is repeated after a worker died is written twice; the later one counts. `search/curves.py` opens a study's runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rankloom.config import TrialConfig, dump
from rankloom.config.trial import TrackingConfig
from rankloom.errors import ConfigError, TrialError
from rankloom.events import (
    Evaluated,
    Event,
    OnEvent,
    RunFinished,
    RunResumed,
    StepFinished,
    StudyProgress,
    TrialEvaluated,
    to_line,
)
from rankloom.launch.run_folder import CURVES, EVENTS, RunFolder, flatten

logger = logging.getLogger(__name__)

MLFLOW_EXPERIMENT = "rankloom"
MLFLOW_PARAMS, MLFLOW_VALUE = 100, 6000
"""MLflow's limits: parameters per call, characters per value."""
_MEASURES = ("loss", "perplexity", "macro_f1", "retention_loss", "latency_ms", "generated_tokens_per_s")
_STEP = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "memory_bytes", "epoch")


class Tracker(Protocol):
    """A destination of events."""

    def write(self, event: Event) -> None: ...

    def close(self, status: str) -> None:
        """`status`: done, interrupted or failed."""


@dataclass(frozen=True)
class Subject:
    """What is tracked: a run, a study, or a study's trial."""

    id: str
    """Unique id, by which a resumed subject is found."""
    name: str
    settings: dict[str, Any]
    """Its config as a dict."""
    tracking: TrackingConfig
    study: Subject | None = None
    """The study of a trial."""


class Trackers:
    """The trackers of one subject; one that fails is dropped with a warning."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def write(self, event: Event) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.write(event)
            except Exception as error:  # a full disk or a lost server must not end the training
                self._trackers.remove(tracker)
                logger.warning("%s stopped recording: %s", type(tracker).__name__, error)

    def close(self, status: str) -> None:
        for tracker in self._trackers:
            try:
                tracker.close(status)
            except Exception as error:
                logger.warning("%s: %s", type(tracker).__name__, error)


def check(trial: TrialConfig) -> None:
    """Raise ConfigError if a configured tracker's package is not installed."""
    wanted = {"mlflow": trial.tracking.mlflow, "wandb": trial.tracking.wandb_project}
    for package, value in wanted.items():
        if value is not None and find_spec(package) is None:
            key = "tracking.mlflow" if package == "mlflow" else "tracking.wandb_project"
            raise ConfigError(
                f"{key}={value}: {package} is not installed; pip install 'rankloom[{package}]', or remove the setting"
            )


@contextmanager
def track_run(trial: TrialConfig, run: RunFolder) -> Iterator[OnEvent]:
    """Yield the function that writes an event to every tracker of the trial.

    Raises:
        TrialError: the run's folder can't be written. ConfigError: a configured tracker does not open.
    """
    with run.open_scratch() as folder:
        try:
            local: list[Tracker] = [Jsonl(folder / EVENTS), TensorBoard(folder / CURVES)]
        except OSError as error:
            raise TrialError(f"output.root: {folder} can't be written: {error}; make room, or choose another") from None
        trackers = Trackers(local + open_servers(Subject(run.id, trial.name, dump(trial), trial.tracking), folder))
        status = "failed"

        def write(event: Event) -> None:
            nonlocal status
            if isinstance(event, RunFinished):
                status = event.status
            trackers.write(event)

        try:
            yield write
        finally:
            trackers.close(status)


def open_servers(subject: Subject, folder: Path) -> list[Tracker]:
    """Return the configured trackers; `folder` is for their local files.

    Raises:
        ConfigError: one of them does not open.
    """
    try:
        found: list[Tracker] = [Mlflow(subject)] if subject.tracking.mlflow is not None else []
        return found + ([WandB(subject, folder)] if subject.tracking.wandb_project is not None else [])
    except Exception as error:  # their clients may raise anything
        raise ConfigError(f"tracking: {type(error).__name__}: {' '.join(str(error).split())}") from error


def list_scalars(event: Event) -> dict[str, float]:
    """Return the numbers of an event to plot, by name."""
    found: dict[str, float | None] = {}
    match event:
        case StepFinished():
            found = {f"train/{key}": getattr(event, key) for key in _STEP}
        case Evaluated():
            found = {"eval/loss": event.loss, "eval/accuracy": event.accuracy, "eval/metric": event.metric}
        case TrialEvaluated():
            found = {"eval/loss": event.loss, "eval/accuracy": event.accuracy, "eval/metric": event.metric}
            found["train/loss"] = event.train_loss
        case StudyProgress():
            found = {"study/best": event.best, "study/tokens": event.tokens}
        case RunFinished(scorecard=dict(scorecard)):
            for side in ("result", "base"):
                measures = scorecard[side] or {}
                found |= {f"{side}/{key}": measures.get(key) for key in _MEASURES}
                for key in ("accuracy", "exact_match", "metric"):
                    found[f"{side}/{key}"] = (measures.get(key) or {}).get("value")
    return {key: float(value) for key, value in found.items() if value is not None}


def _get_step(event: Event) -> int:
    """Return the step that an event's scalars belong to."""
    match event:
        case RunFinished(steps=step):
            return step
        case StepFinished(step=step) | Evaluated(step=step) | TrialEvaluated(step=step) | StudyProgress(step=step):
            return step
    return 0


class Jsonl:
    """Writes every event as a line with its time."""

    def __init__(self, file: Path) -> None:
        self._opened = file.open("a", encoding="utf-8", buffering=1)

    def write(self, event: Event) -> None:
        self._opened.write(to_line(event) + "\n")

    def close(self, status: str) -> None:
        self._opened.close()


class TensorBoard:
    """Writes curves through tensorboard's own writer, which does not need torch."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))

    def write(self, event: Event) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Entry
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        if isinstance(event, RunResumed):  # tells TensorBoard to forget the steps that are now repeated
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Entry(wall_time=time.time(), step=event.step + 1, session_log=start))
        if values := list_scalars(event):
            summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
            self._writer.add_event(Entry(wall_time=time.time(), step=_get_step(event), summary=summary))

    def close(self, status: str) -> None:
        self._writer.close()


class Mlflow:
    """An MLflow run, found by its id when it is resumed; a study's run is the parent of its trials'.

    It uses the client, which has no module state.
    """

    def __init__(self, subject: Subject) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=subject.tracking.mlflow)
        found = self._client.get_experiment_by_name(MLFLOW_EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(MLFLOW_EXPERIMENT)
        if run := self._find(experiment, subject):
            self._run = run
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {"rankloom_id": subject.id}
        if subject.study is not None and (parent := self._find(experiment, subject.study)):
            tags["mlflow.parentRunId"] = parent
        self._run = self._client.create_run(experiment, tags=tags, run_name=subject.name).info.run_id
        params = [Param(key, str(value)[:MLFLOW_VALUE]) for key, value in flatten(subject.settings).items()]
        for start in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(self._run, params=params[start : start + MLFLOW_PARAMS])

    def write(self, event: Event) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        if metrics := [Metric(key, value, now, _get_step(event)) for key, value in list_scalars(event).items()]:
            self._client.log_batch(self._run, metrics=metrics)

    def close(self, status: str) -> None:
        self._client.set_terminated(self._run, {"done": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED"))

    def _find(self, experiment: str, subject: Subject) -> str | None:
        runs = self._client.search_runs([experiment], f"tags.rankloom_id = '{subject.id}'")
        return runs[0].info.run_id if runs else None


class WandB:
    """A Weights & Biases run, found by its id when it is resumed; a study's trials are a group."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=subject.tracking.wandb_project,
            name=subject.name,
            id=subject.id,
            group=subject.study.name if subject.study else None,
            resume="allow",
            reinit="create_new",  # a study has several at once
            config=subject.settings,
            dir=folder,
            settings=wandb.Settings(silent=True),
        )

    def write(self, event: Event) -> None:
        if values := list_scalars(event):
            self._run.log(values, step=_get_step(event))

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "done" else 1)
