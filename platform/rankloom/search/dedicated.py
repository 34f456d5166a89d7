"""A trial that can't share a base (full, GaLore, LISA, AdaLoRA, ...): a Ray Train run of its own.

It is the run that `rankloom train` would make, in the study's folder, watched through its events: each evaluation is a
report. It does not wait for Tune between two reports; a stop reaches it at its next step. A finished run has an
adapter; a stopped one gets it when the study ends, if it is among the best (`finish`).
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
from dataclasses import asdict, fields, replace
from pathlib import Path

from rankloom.config import StudyConfig, TrialConfig, dump, parse
from rankloom.config.study import SearchConfig
from rankloom.errors import RankloomError, TrialError
from rankloom.evals.own_metric import MetricFunction
from rankloom.events import Evaluated, Event, StepFinished
from rankloom.hosts.reports import TrialReport, round_costs
from rankloom.launch.background import Background
from rankloom.launch.failures import to_failure
from rankloom.launch.handed_over import load_study_metric
from rankloom.launch.results import TrialResult
from rankloom.launch.run_folder import RESULT
from rankloom.launch.trainer import train_trial
from rankloom.registry.scorecard import Scorecard

LEAVE_TIMEOUT_S = 60.0
PROGRESS = "progress.json"
ADAPTERS = "adapters"
"""Folder in the study's folder with each trial's best adapter."""
POLL_S = 0.2


def build_dedicated_run(
    study: StudyConfig, trial: TrialConfig, trial_id: str, folder: Path, cpus: int
) -> DedicatedBackend:
    """Return the run of a study's trial, begun or not; `folder` is the study's."""
    root, best_folder = folder / "dedicated" / trial_id, folder / ADAPTERS / trial_id
    return DedicatedBackend(trial, study.search, root, best_folder, cpus)


def read_own_scorecard(trial: TrialConfig, trial_id: str, folder: Path) -> Scorecard | None:
    """Return the scorecard that a trial's own run ended with; None: it did not end, or shared a host.

    Args:
        folder: the study's.
    """
    path = folder / "dedicated" / trial_id / "runs" / trial.name / RESULT
    return TrialResult.model_validate_json(path.read_bytes()).scorecard if path.is_file() else None


class DedicatedBackend:
    """One run; see `trainable.TrialBackend`."""

    def __init__(self, trial: TrialConfig, search: SearchConfig, root: Path, best_folder: Path, cpus: int) -> None:
        """
        Args:
            search: the study's search settings.
            root: the run's output root.
            best_folder: the folder for its adapter.
            cpus: cores of a worker.
        """
        tree = dump(trial)
        # finalists are fully measured when the study ends; each run publishes to its own registry
        tree["output"] |= {"root": str(root), "registry": None, "publish": True}
        tree["tracking"] |= {"mlflow": None, "wandb_project": None}  # the study itself tracks its trials
        self._objectives = search.objectives
        tree["eval"] |= {"base": False, "latency": "latency_ms" in self._objectives, "retention": None}
        tree["compute"] |= {
            "num_workers": max(1, trial.compute.num_workers),
            "cpus_per_worker": trial.compute.cpus_per_worker or cpus,
        }
        self._trial = parse(TrialConfig, tree)
        self._search = search
        self._best_folder = best_folder
        self._study = best_folder.parents[1]
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._running: Background | None = None
        self._last_step: StepFinished | None = None
        self._last: TrialReport | None = None

    def advance(self, n: int) -> TrialReport:
        running = self._running or self._start()
        while True:
            try:
                event = self._events.get(timeout=POLL_S)
            except queue.Empty:
                if not running.join(0) or not self._events.empty():
                    continue
                return self._end(n, running)
            match event:
                case StepFinished():
                    self._last_step = event
                case Evaluated(step=step) if self._last_step and step > (self._last.step if self._last else 0):
                    self._last = self._report(n + 1, event, self._last_step)
                    if step < self._last_step.total_steps:
                        return self._last

    def save(self, n: int, folder: Path) -> None:
        """Write the last report; the run keeps its own checkpoints."""
        folder.mkdir(parents=True)
        (folder / PROGRESS).write_text(json.dumps(self._last and asdict(self._last)))

    def load(self, n: int, folder: Path) -> None:
        saved = json.loads((folder / PROGRESS).read_text())
        known = {each.name for each in fields(TrialReport)}
        # older releases wrote no `n`, and only two keys where nothing was reported
        reported = saved is not None and "percent" in saved
        self._last = TrialReport(**{k: v for k, v in saved.items() if k in known} | {"n": n}) if reported else None

    def leave(self) -> None:
        if self._running is not None:
            self._stop.set()
            self._running.join(LEAVE_TIMEOUT_S)
            self._running = None

    def finish(self) -> None:
        """Finish a stopped run: put its best checkpoint's adapter where finished runs have theirs."""
        if not self._best_folder.is_dir():
            self._keep(train_trial(self._trial, resume=True, train=False, study=self._study, metric=self._metric))

    @property
    def _metric(self) -> MetricFunction | None:
        """The metric that Python code handed over; None where `eval.metric` names it."""
        return load_study_metric(self._search.metric, self._study) if self._search.is_handed_over else None

    def _start(self) -> Background:
        begun = (Path(self._trial.output.root) / "runs" / self._trial.name / "trial.yaml").is_file()
        self._stop, self._events = threading.Event(), queue.SimpleQueue()
        put, stop, metric = self._events.put, self._stop, self._metric
        self._running = Background(
            lambda: train_trial(self._trial, resume=begun, on_event=put, stop=stop, study=self._study, metric=metric)
        )
        return self._running

    def _report(self, n: int, event: Evaluated, last_step: StepFinished) -> TrialReport:
        value, sign = getattr(event, self._search.key), self._search.sign
        before = self._last.best_value if self._last else None
        best = before is None or sign * value > sign * before
        return TrialReport(
            n=n,
            step=event.step,
            percent=100 * event.step / max(1, last_step.total_steps),
            loss=event.loss,
            accuracy=event.accuracy,
            metric=event.metric,
            train_loss=last_step.loss,
            tokens=last_step.tokens,
            train_s=0.0,
            best=best,
            best_value=value if best else before,
        )

    def _end(self, n: int, running: Background) -> TrialReport:
        """Return the last report of a run that ended, perhaps before its budget, and keep its adapter."""
        try:
            outcome = running.result()
        except RankloomError:
            raise
        except Exception as error:
            raise to_failure(error).error from None
        self._keep(outcome)
        scorecard = outcome.scorecard
        assert scorecard is not None  # it was not stopped
        measured = {"memory_bytes": outcome.memory_bytes, "latency_ms": scorecard.result.latency_ms}
        costs = round_costs(measured, self._objectives)
        if self._last is None:
            raise TrialError(f"{self._trial.name}: it ended without an evaluation")
        ended = replace(self._last, n=n + 1, percent=100.0, train_s=scorecard.train_s, done=True, finished=True)
        return ended.add_costs(costs)

    def _keep(self, outcome: TrialResult) -> None:
        staged = self._best_folder.with_name(f".staged-{self._best_folder.name}")
        shutil.rmtree(staged, ignore_errors=True)
        assert outcome.folder is not None  # a study's runs all publish, to registries in its folder
        shutil.copytree(outcome.folder, staged)
        shutil.rmtree(self._best_folder, ignore_errors=True)
        staged.rename(self._best_folder)
