"""A trial as Ray Tune sees it: a thin class that imports no torch. `fused.py` and `dedicated.py` do its work.

Reports are numbered, and a checkpoint is the state at the last report that Tune got.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ray import tune

from rankloom.config import StudyConfig
from rankloom.config.study import is_fusable
from rankloom.errors import RankloomError, TrialError
from rankloom.hosts.reports import FAILED_LOSS, TrialReport
from rankloom.search.dedicated import ADAPTERS, build_dedicated_run
from rankloom.search.fused import FusedBackend, LostError
from rankloom.search.suggestion import Suggestion

CHECKPOINT = "trial.json"


class TrialBackend(Protocol):
    """Runs a trial: as a member of a host, or on its own."""

    def advance(self, n: int) -> TrialReport:
        """Return report n + 1."""

    def save(self, n: int, folder: Path) -> None:
        """Write the state to continue from report n."""

    def load(self, n: int, folder: Path) -> None:
        """Continue from a saved state; call it before the first `advance`."""

    def leave(self) -> None:
        """End the trial; a second call does nothing."""


class StudyTrial(tune.Trainable):  # type: ignore[misc]
    """The trial's Ray Tune class. An actor of it is reused for one trial after another."""

    def setup(self, config: dict[str, Any], study: StudyConfig, hosts: Any, folder: str, dedicated_cpus: int) -> None:
        """
        Args:
            config: a point of the study's space, with the trial's number.
            hosts: the `hosts.hosts.Hosts` actor.
            folder: the study's folder.
            dedicated_cpus: cores for a worker of a trial that can't share a base.
        """
        self._study, self._hosts, self._folder, self._dedicated_cpus = study, hosts, Path(folder), dedicated_cpus
        self._n: int = 0
        self._saved_at: float = 0.0
        self._begin(config)

    def step(self) -> dict[str, Any]:
        try:
            report = self._backend.advance(self._n)
        except LostError:
            raise  # Tune restarts the trial from its own checkpoint
        except RankloomError as error:
            return self._report_failure(getattr(error, "cause", error))  # Ray's own text holds a remote stack trace
        self._n = report.n
        due = time.monotonic() - self._saved_at >= self._study.hosts.checkpoint_every_s
        return asdict(report) | {"should_checkpoint": due and not report.done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        folder = Path(checkpoint_dir)
        self._backend.save(self._n, folder / "state")
        (folder / CHECKPOINT).write_text(json.dumps({"n": self._n}))
        self._saved_at = time.monotonic()

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        folder = Path(checkpoint_dir)
        self._backend.leave()
        self._n = int(json.loads((folder / CHECKPOINT).read_text())["n"])
        self._backend.load(self._n, folder / "state")

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._backend.leave()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._backend.leave()

    def _begin(self, config: dict[str, Any]) -> None:
        """Take a point's trial without starting it: a checkpoint may be loaded first."""
        trial = Suggestion.read(config).resolve(self._study)
        self._n = 0
        self._saved_at = time.monotonic()
        self._backend: TrialBackend
        if is_fusable(trial):
            best_folder = self._folder / ADAPTERS / self.trial_id
            self._backend = FusedBackend(trial, self.trial_id, self._hosts, best_folder, self._study.hosts.max_failures)
        else:
            self._backend = build_dedicated_run(self._study, trial, self.trial_id, self._folder, self._dedicated_cpus)

    def _report_failure(self, error: RankloomError) -> dict[str, Any]:
        """Return the last report of a trial that a retry would not help.

        A trial's own failure ends the trial. An error of the data, the base or the cluster ends the study and leaves
        the trial unfinished.
        """
        fatal = not isinstance(error, TrialError)
        report = TrialReport(
            n=self._n + 1,
            step=0,
            percent=0.0 if fatal else 100.0,
            loss=FAILED_LOSS,
            accuracy=0.0,
            metric=-self._study.search.sign * FAILED_LOSS,
            train_loss=0.0,
            tokens=0,
            train_s=0.0,
            done=not fatal,
            error=str(error),
            fatal=fatal,
        )
        return asdict(report) | {"should_checkpoint": False}
