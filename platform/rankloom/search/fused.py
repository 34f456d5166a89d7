"""A trial as a member of a host: asks for a seat, then for one report after another.

The host trains ahead of that within a bound, so that it does not wait for Tune's way there and back.
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
"""How long a trial waits for its host to be restarted, before another is looked for."""


class LostError(TrialError):
    """The trial has to begin again from its own checkpoint."""


class FusedBackend:
    """A membership; see `trainable.Way`."""

    def __init__(self, trial: TrialConfig, trial_id: str, hosts: Any, best_folder: Path, max_failures: int) -> None:
        """
        Args:
            hosts: the `launch.hosts.Hosts` actor.
            best_folder: where the host puts the trial's best adapter.
            max_failures: deaths of the host that are lived through within one report.
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
        files = self._files if self._host is None else self._ask("snapshot", n)
        write_files(folder, files or {})

    def load(self, n: int, folder: Path) -> None:
        self._files = read_files(folder) or None

    def leave(self) -> None:
        if self._host is None:
            return
        # the answers are not awaited: whoever can't be reached has forgotten this trial already
        self._host.leave.remote(self._key)
        self._hosts.release.remote(self._trial_id)
        self._host = None

    def _ask(self, method: str, n: int) -> Any:
        """Call one of the host's methods that are about report n, on and on while it dies and comes back."""
        for _ in range(1 + self._max_failures):
            try:
                return ray.get(getattr(self._host, method).remote(self._key, n))
            except (RayActorError, KeyError):  # it died; or it died and was restarted, or the lease ran out
                self._join(n, recover=True)
        raise LostError(f"{self._trial.name}: its host died again and again")

    def _join(self, n: int, *, recover: bool) -> None:
        """Take a seat, from the checkpoint that was loaded, or where a host that died left this membership.

        Raises:
            LostError: the host did not return, or has nothing of this membership.
        """
        deadline = time.monotonic() + RETURN_TIMEOUT_S
        if not recover:
            # unique to this membership: a cached actor of the same trial's past must not end it
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
                ray.get(self._hosts.gone.remote(self._trial_id))
            raise LostError(f"{self._trial.name}: the host is gone, and what it kept of this trial with it")
