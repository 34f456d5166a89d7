"""A trial as a member of a host: it joins, then asks for one report after another.

The host trains ahead of the reports within a bound, so that it does not wait for Tune's round trip.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from rankloom.config import TrialConfig
from rankloom.errors import TrialError
from rankloom.hosts.membership import Files, read_files, write_files
from rankloom.hosts.reports import TrialReport

RETURN_TIMEOUT_S = 30.0
"""Seconds that a trial waits for its host to restart, before it looks for another."""


class LostError(TrialError):
    """The trial must restart from its own checkpoint."""


class FusedBackend:
    """A membership in a host; see `trainable.TrialBackend`."""

    def __init__(self, trial: TrialConfig, trial_id: str, hosts: Any, best_folder: Path, max_failures: int) -> None:
        """
        Args:
            hosts: the `hosts.hosts.Hosts` actor.
            best_folder: the folder in which the host keeps the trial's best adapter.
            max_failures: host deaths tolerated per report.
        """
        self._trial, self._trial_id, self._hosts = trial, trial_id, hosts
        self._best_folder, self._max_failures = best_folder, max_failures
        self._host: Any = None
        self._files: Files | None = None

    def advance(self, n: int) -> TrialReport:
        if self._host is None:
            self._join(n, recover=False)
        report: TrialReport = self._ask("advance", n)
        return report

    def save(self, n: int, folder: Path) -> None:
        files = self._files if self._host is None else self._ask("get_snapshot", n)
        write_files(folder, files or {})

    def load(self, n: int, folder: Path) -> None:
        self._files = read_files(folder) or None

    def leave(self) -> None:
        if self._host is None:
            return
        # do not wait for the answers: an actor that can't be reached has forgotten this trial
        self._host.leave.remote(self._key)
        self._hosts.release.remote(self._trial_id)
        self._host = None

    def _ask(self, method: str, n: int) -> Any:
        """Call a method of the host about report n; rejoin and repeat where the host died."""
        for _ in range(1 + self._max_failures):
            try:
                return ray.get(getattr(self._host, method).remote(self._key, n))
            except (RayActorError, KeyError):  # the host died, or restarted, or the lease ran out
                self._join(n, recover=True)
        raise LostError(f"{self._trial.name}: its host died too often")

    def _join(self, n: int, *, recover: bool) -> None:
        """Join a host from the loaded checkpoint, or rejoin a restarted host with `recover`.

        Raises:
            LostError: the host did not return, or has lost this membership.
        """
        deadline = time.monotonic() + RETURN_TIMEOUT_S
        if not recover:
            # unique to this membership: an earlier actor of the trial must not end it
            self._key = f"{self._trial_id}#{uuid.uuid4().hex[:8]}"
            self._host = ray.get(self._hosts.assign.remote(self._trial_id, self._trial))
        best_folder = str(self._best_folder)
        while True:
            try:
                joined = self._host.join.remote(
                    self._key, self._trial, files=self._files, n=n, recover=recover, best_folder=best_folder
                )
                if ray.get(joined):
                    self._files = None
                    return
            except RayActorError as error:
                if isinstance(error, ActorUnavailableError) and time.monotonic() < deadline:
                    time.sleep(0.5)
                    continue
                ray.get(self._hosts.drop_lost.remote(self._trial_id))
            raise LostError(f"{self._trial.name}: the host is gone, with its state of this trial")
