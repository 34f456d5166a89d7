"""Curves: write a study to its trackers, as a run for each trial and a parent run for the study.

TensorBoard's files are in `<study>/tensorboard`, one folder per trial; MLflow's trials are nested in the study's run;
W&B's are a group. All come from the driver's events, wherever a trial runs, and are written in a separate thread: a
slow server must not delay the scheduler.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankloom.config import StudyConfig, dump
from rankloom.errors import ConfigError
from rankloom.events import (
    Event,
    OnEvent,
    RunFinished,
    RunResumed,
    StudyFinished,
    StudyProgress,
    TrialEnded,
    TrialEvaluated,
    TrialStarted,
)
from rankloom.launch.run_folder import CURVES
from rankloom.launch.tracking import Subject, TensorBoard, Tracker, Trackers, open_servers
from rankloom.search.leaderboard import Leaderboard

logger = logging.getLogger(__name__)


@contextmanager
def track_study(study: StudyConfig, study_id: str, leaderboard: Leaderboard, folder: Path) -> Iterator[OnEvent]:
    """Yield the function that takes the study's events, after the leaderboard has taken them.

    Args:
        study_id: the study's unique id, which stays when it is resumed.
        folder: the study's folder.

    Raises:
        ConfigError: a configured tracker does not open.
    """
    own = Subject(study_id, study.name, dump(study), study.baseline.tracking)
    curves = _Curves(own, leaderboard, folder, open_servers(own, folder))
    try:
        yield curves.take
    finally:
        curves.close()


class _Curves:
    def __init__(self, own: Subject, leaderboard: Leaderboard, folder: Path, trackers: list[Tracker]) -> None:
        self._own, self._leaderboard, self._folder = own, leaderboard, folder
        self._told = {trial.id: max(trial.curve, default=0) for trial in leaderboard.trials.values()}
        self._status = "interrupted"
        self._thread = ThreadPoolExecutor(1)
        self._open: dict[str, Trackers] = {}
        self._run_later(self._begin, own, trackers)

    def take(self, event: Event) -> None:
        """Queue the events to plot; do not wait for a tracker."""
        match event:
            case StudyFinished():
                self._take_result(event)
            case TrialStarted(trial=trial_id):
                self._run_later(self._write, self._get_subject(trial_id), event)
            case TrialEvaluated(trial=trial_id):
                subject = self._get_subject(trial_id)
                if event.n <= self._told.get(trial_id, 0):
                    self._run_later(self._write, subject, RunResumed(event.step - 1))
                self._run_later(self._write, subject, event)
                self._told[trial_id] = event.n
            case TrialEnded(trial=trial_id):
                subject = self._get_subject(trial_id)
                self._run_later(self._write, subject, event)
                self._run_later(self._end, subject, "failed" if event.status == "failed" else "done")
                self._run_later(self._write, self._own, self._get_progress())

    def close(self) -> None:
        """Wait until all is written."""
        self._thread.shutdown()
        for trackers in self._open.values():
            trackers.close(self._status)

    def _take_result(self, finished: StudyFinished) -> None:
        """Write the finalists' scorecards; the winner's is the study's too."""
        for finalist in finished.finalists:
            subject = self._get_subject(finalist.trial)
            event = RunFinished(status="done", steps=finalist.step or 0, scorecard=finalist.scorecard)
            self._run_later(self._write, subject, event)
            self._run_later(self._end, subject, "done")
        winner = None if finished.winner is None else finished.winner.scorecard
        ended = RunFinished(status="done", steps=self._get_progress().step, scorecard=winner)
        self._run_later(self._write, self._own, ended)
        self._status = "done"

    def _get_progress(self) -> StudyProgress:
        """Return the best so far, against the trials that have ended."""
        search, ranking = self._leaderboard.study.search, self._leaderboard.rank_trials()
        best = ranking[0].find_best(search) if ranking else None
        ended = sum(trial.status != "running" for trial in self._leaderboard.trials.values())
        return StudyProgress(
            step=ended, best=best.get_value(search.key) if best else None, tokens=self._leaderboard.tokens
        )

    def _get_subject(self, trial_id: str) -> Subject:
        config = self._leaderboard.trials[trial_id].config
        return Subject(f"{self._own.id}-{trial_id}", config.name, dump(config), config.tracking, self._own)

    def _run_later(self, work: Any, *arguments: Any) -> None:
        self._thread.submit(work, *arguments)

    def _begin(self, subject: Subject, trackers: list[Tracker]) -> None:
        place = self._folder / CURVES / (subject.name if subject.study else "")
        try:
            trackers.append(TensorBoard(place))
        except OSError as error:
            logger.warning("TensorBoard: %s", error)
        self._open[subject.id] = Trackers(trackers)

    def _write(self, subject: Subject, event: Event) -> None:
        if subject.id not in self._open:
            try:
                self._begin(subject, open_servers(subject, self._folder))
            except ConfigError as error:
                logger.warning("%s: %s", subject.name, error)
                self._begin(subject, [])
        self._open[subject.id].write(event)

    def _end(self, subject: Subject, status: str) -> None:
        self._open.pop(subject.id).close(status)
