"""Journal: a callback of Ray Tune that writes the study's events to disk and reports them to the caller.

It also passes the user's request to stop to Tune, and ends the study on an error that would fail every trial.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

from ray import tune

from rankloom.errors import TrialError
from rankloom.events import (
    CurvePoint,
    HostStatus,
    OnEvent,
    PhaseStarted,
    TrialEnded,
    TrialEvaluated,
    TrialStarted,
    TrialStatus,
    to_line,
)
from rankloom.hosts.host_loop import HostReport
from rankloom.search.leaderboard import Leaderboard
from rankloom.search.saved_state import keep_state
from rankloom.search.study_files import TUNE

STATUS_EVERY_S = 1.0
KEEP_EVERY_S = 5.0
"""Seconds between two copies of Ray Tune's state."""
ENOUGH = 2**20
"""Bytes that a folder must accept; with less it is full."""


def find_full_disk(folder: Path) -> TrialError | None:
    """Return the error if a study's folder can't be written any more, else None."""
    try:
        with tempfile.TemporaryFile(dir=folder) as opened:
            opened.write(bytes(ENOUGH))
    except OSError as error:
        return TrialError(f"output.root: {folder} can't be written: {error.strerror}; make room; --resume continues")
    return None


class Journal(tune.Callback):  # type: ignore[misc]
    """Writes the journal, updates the leaderboard, reports to the caller."""

    def __init__(self, leaderboard: Leaderboard, path: Path, tell: OnEvent, hosts: Any, stop: threading.Event) -> None:
        self.leaderboard = leaderboard
        self.fatal: str | None = None
        """An error of the study, not of a trial: the data or the base can't be loaded."""
        self.interrupted = False
        self._stopped = False
        self.host_stats: dict[str, HostReport] = {}
        """By the host's label."""
        self._folder = path.parent
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._tell, self._hosts, self._stop = tell, hosts, stop
        self._stats: Any = None
        self._told_at = self._kept_at = 0.0
        self._began_at, self._share_before = time.monotonic(), leaderboard.share_done
        self._points: dict[str, dict[str, Any]] = {}
        self._trials: list[Any] = []
        self._statuses: dict[str, str] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._points.get(trial.trial_id) != trial.config:  # skip after a pause, unless an exploit changed the point
            self._points[trial.trial_id] = dict(trial.config)
            self._write(TrialStarted(trial=trial.trial_id, point=trial.config))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:  # fmt: skip
        if result.get("error"):
            self.fatal = self.fatal or (result["error"] if result.get("fatal") else None)
            return
        point = {each.name: result[each.name] for each in fields(CurvePoint)}
        self._write(TrialEvaluated(trial=trial.trial_id, **point))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        status: TrialStatus = "failed" if last.get("error") else "done" if last.get("finished") else "stopped"
        self._write(TrialEnded(trial=trial.trial_id, status=status, error=last.get("error")))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if problem := find_full_disk(self._folder):  # not the trial's fault: Tune restarts it at --resume
            self.fatal = self.fatal or str(problem)
            return
        if trial.trial_id not in self.leaderboard.trials:  # it never started
            self._write(TrialStarted(trial=trial.trial_id, point=trial.config))
        error = " ".join(str(trial.get_pickled_error() or "its process died too often").split())[-400:]
        self._write(TrialEnded(trial=trial.trial_id, status="failed", error=error))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._trials = trials
        # at the end of a stopped run Tune marks every trial terminated, though it saved them as running
        self._statuses = {trial.trial_id: trial.status for trial in trials}
        self._poll()
        in_main = threading.current_thread() is threading.main_thread()
        if self.fatal is not None and not in_main:
            raise TrialError(self.fatal)  # Tune ends its trials, and the run with this
        if (self._stop.is_set() or self.fatal) and in_main:
            self._stopped = self._stop.is_set()
            self._stop.clear()
            signal.raise_signal(signal.SIGINT)  # Tune's own handler saves its state and ends the run

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        if not self._trials:  # all ended in an earlier run, so there was no step
            self._trials, self._statuses = trials, {trial.trial_id: trial.status for trial in trials}

    def reconcile(self) -> None:
        """Forget trials that a killed driver wrote but Tune does not know, and end those that ended."""
        known = {trial.trial_id: trial for trial in self._trials}
        for trial_id in [trial_id for trial_id in self.leaderboard.trials if trial_id not in known]:
            del self.leaderboard.trials[trial_id]
        for trial_id, trial in known.items():
            standing = self.leaderboard.trials.get(trial_id)
            ended = self._statuses.get(trial_id) == "TERMINATED"
            if ended and standing is not None and standing.status == "running":
                self.on_trial_complete(0, self._trials, trial)
        unfinished = any(status not in ("TERMINATED", "ERROR") for status in self._statuses.values())
        self.interrupted = unfinished or self._stopped  # all may have ended before the next trial starts

    def take_stats(self, stats: list[HostReport]) -> None:
        """Take the hosts' counters; a host that was given back keeps its last ones."""
        for each in stats:
            before = self.host_stats.get(each.label)
            if each.size and not (before and before.size):
                self._tell(PhaseStarted("launch", f"{each.label}: {each.size}"))
            self.host_stats[each.label] = each

    def close(self) -> None:
        self._file.close()

    def _write(self, event: TrialStarted | TrialEvaluated | TrialEnded) -> None:
        """Write a trial's event with the trial's name and method, and report it to the caller."""
        self.leaderboard.add(event)
        trial = self.leaderboard.trials[event.trial]
        named = replace(event, name=trial.config.name, method=trial.method)
        self._file.write(to_line(named) + "\n")
        self._file.flush()
        self._tell(named)

    def _poll(self) -> None:
        """Ask the hosts for their counters every second, without waiting for the answer, and keep Tune's state."""
        import ray

        if self._stats is not None and ray.wait([self._stats], timeout=0)[0]:
            with suppress(ray.exceptions.RayError):
                self.take_stats(ray.get(self._stats))
            self._stats = None
        if time.monotonic() - self._told_at < STATUS_EVERY_S:
            return
        self._told_at = time.monotonic()
        if self._told_at - self._kept_at >= KEEP_EVERY_S:
            self._kept_at = self._told_at
            keep_state(self._folder / TUNE)
        if self._stats is None:
            self._stats = self._hosts.get_stats.remote()
        self.tell_status()

    def tell_status(self) -> None:
        """Report the study's status, for a display."""
        elapsed = time.monotonic() - self._began_at
        done = self.leaderboard.share_done - self._share_before
        eta = elapsed / done * (1 - self.leaderboard.share_done) if done > 0 else None
        names = [each.name for each in fields(HostStatus)]
        hosts = [HostStatus(**{name: getattr(stats, name) for name in names}) for stats in self.host_stats.values()]
        self._tell(replace(self.leaderboard.build_status(), hosts=hosts, elapsed_s=elapsed, eta_s=eta))
