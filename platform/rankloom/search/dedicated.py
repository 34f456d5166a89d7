"""A trial that can't share a base (full, GaLore, LISA, AdaLoRA, ...): a Ray Train run of its own.

It is the run that `rankloom train` would make, in a folder of the study's, watched through its events: each evaluation
is a report. It does not wait for Tune between two of them; a stop reaches it at its next step. A run that came to its
end has an adapter; one that was stopped gets it when the study ends, if it is among the best (`finish`).
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
from pathlib import Path
from typing import Any

from rankloom.config import StudyConfig, TrialConfig, dump, parse
from rankloom.config.study import SearchConfig
from rankloom.errors import RankloomError
from rankloom.hosts.membership import Report, costs_of, no_costs
from rankloom.launch.background import Background
from rankloom.launch.failures import failure_of
from rankloom.launch.trainer import train_trial

LEAVE_TIMEOUT_S = 60.0
PROGRESS = "progress.json"
ADAPTERS = "adapters"
"""In the study's folder: each trial's best adapter."""
POLL_S = 0.2


def dedicated_run(study: StudyConfig, trial: TrialConfig, trial_id: str, folder: Path, cpus: int) -> DedicatedBackend:
    """The run of a study's trial, begun or not; `folder` is the study's."""
    root, best_folder = folder / "dedicated" / trial_id, folder / ADAPTERS / trial_id
    return DedicatedBackend(trial, study.search, root, best_folder, cpus)


class DedicatedBackend:
    """One run; see `trainable.Way`."""

    def __init__(self, trial: TrialConfig, search: SearchConfig, root: Path, best_folder: Path, cpus: int) -> None:
        """
        Args:
            search: what the study looks for.
            root: the run's output root.
            best_folder: where its adapter goes.
            cpus: cores of a worker.
        """
        tree = dump(trial)
        # what the finalists are measured by is measured when the study ends; its registry is the run's own
        tree["output"] |= {"root": str(root), "registry": None, "publish": True}
        tree["tracking"] |= {"mlflow": None, "wandb_project": None}  # the study tracks all its trials alike
        self._objectives = search.objectives
        tree["eval"] |= {"base": False, "latency": "latency_ms" in self._objectives, "retention": None}
        tree["compute"] |= {
            "num_workers": max(1, trial.compute.num_workers),
            "cpus_per_worker": trial.compute.cpus_per_worker or cpus,
        }
        self._trial = parse(TrialConfig, tree)
        self._sign = 1 if search.best == "max" else -1
        self._best_folder = best_folder
        self._study = best_folder.parents[1]
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._running: Background | None = None
        self._last_step: dict[str, Any] = {"loss": 0.0, "tokens": 0, "total_steps": 0}
        self._last: Report = {"step": 0, "best_value": None}

    def advance(self, n: int) -> Report:
        running = self._running or self._start()
        while True:
            try:
                event = self._events.get(timeout=POLL_S)
            except queue.Empty:
                if not running.join(0) or not self._events.empty():
                    continue
                return self._end(n, running)
            if event["event"] == "step":
                self._last_step = event
            elif event["event"] == "eval" and event["step"] > self._last["step"]:
                self._last = self._report(event)
                if event["step"] < self._last_step["total_steps"]:
                    return self._last | {"n": n + 1}

    def save(self, n: int, folder: Path) -> None:
        """The run keeps its own checkpoints; this is which of its evaluations were told."""
        folder.mkdir(parents=True)
        (folder / PROGRESS).write_text(json.dumps(self._last))

    def load(self, n: int, folder: Path) -> None:
        self._last = json.loads((folder / PROGRESS).read_text())

    def leave(self) -> None:
        if self._running is not None:
            self._stop.set()
            self._running.join(LEAVE_TIMEOUT_S)
            self._running = None

    def finish(self) -> None:
        """End a run that was stopped: its best checkpoint's adapter goes where those of finished runs are."""
        if not self._best_folder.is_dir():
            self._keep(train_trial(self._trial, resume=True, train=False, study=self._study))

    def _start(self) -> Background:
        begun = (Path(self._trial.output.root) / "runs" / self._trial.name / "trial.yaml").is_file()
        self._stop, self._events = threading.Event(), queue.SimpleQueue()
        put, stop = self._events.put, self._stop
        self._running = Background(
            lambda: train_trial(self._trial, resume=begun, on_event=put, stop=stop, study=self._study)
        )
        return self._running

    def _report(self, event: dict[str, Any]) -> Report:
        value = event["loss"] if self._trial.eval.metric == "loss" else event["accuracy"]
        before = self._last["best_value"]
        best = before is None or self._sign * value > self._sign * before
        return {
            "step": event["step"],
            "percent": 100 * event["step"] / max(1, self._last_step["total_steps"]),
            "train_loss": self._last_step["loss"],
            "tokens": self._last_step["tokens"],
            "train_s": 0.0,
            "loss": event["loss"],
            "accuracy": event["accuracy"],
            "best": best,
            "best_value": value if best else before,
            "done": False,
            "finished": False,
            "error": None,
        } | no_costs()

    def _end(self, n: int, running: Background) -> Report:
        """The run came to its end, perhaps earlier than its budget: its last evaluation, now with an adapter."""
        try:
            outcome = running.result()
        except RankloomError:
            raise
        except Exception as error:
            raise failure_of(error).error from None
        self._keep(outcome)
        train_s = float(outcome["scorecard"]["train_s"])
        measured = {"memory_bytes": outcome["memory_bytes"], "latency_ms": outcome["scorecard"]["result"]["latency_ms"]}
        costs = costs_of(measured, self._objectives)
        return self._last | costs | {"n": n + 1, "percent": 100.0, "train_s": train_s, "done": True, "finished": True}

    def _keep(self, outcome: dict[str, Any]) -> None:
        staged = self._best_folder.with_name(f".staged-{self._best_folder.name}")
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(outcome["adapter"], staged)
        shutil.rmtree(self._best_folder, ignore_errors=True)
        staged.rename(self._best_folder)
