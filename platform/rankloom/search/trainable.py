"""A fused trial as Ray Tune sees it: a thin class that imports no torch and only talks to its host.

`step` asks for the next report. The host trains ahead of that within a bound, so that it does not wait for Tune's way
there and back. Reports are numbered, and a checkpoint is the host's snapshot of the last one that Tune was told.
"""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import ActorUnavailableError, RayActorError

from rankloom.config import StudyConfig, dump, parse
from rankloom.errors import RankloomError, TrialError
from rankloom.launch.host_actor import Files, failed, read_files, write_files

CHECKPOINT = "trial.json"
RETURN_TIMEOUT_S = 300.0
"""How long a trial waits for its host to be restarted."""


class FusedTrial(tune.Trainable):  # type: ignore[misc]
    """A member of a host. Actors of this class are reused: one trial after another, in the same process."""

    def setup(self, config: dict[str, Any], study: dict[str, Any], hosts: Any, adapters: str) -> None:
        """
        Args:
            config: a point of the study's space, with the trial's number.
            hosts: the `launch.hosts.Hosts` actor.
            adapters: the folder for the trials' best adapters.
        """
        self._study = parse(StudyConfig, study)
        self._hosts = hosts
        self._adapters = adapters
        self._files: Files | None = None
        self._begin(config)

    def step(self) -> dict[str, Any]:
        try:
            if self._host is None:
                self._join(recover=False)
            report = self._advance()
        except LostError:
            raise  # Tune starts the trial again from its own checkpoint
        except RankloomError as error:
            report = self._gave_up(getattr(error, "cause", error))  # Ray's own text holds a remote stack trace
        self._n = report["n"]
        due = time.monotonic() - self._saved_at >= self._study.hosts.checkpoint_every_s
        return report | {"should_checkpoint": due and not report["done"]}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        files = self._files
        if self._host is not None:
            files = ray.get(self._host.snapshot.remote(self._key, self._n))
        write_files(Path(checkpoint_dir) / "state", files or {})
        (Path(checkpoint_dir) / CHECKPOINT).write_text(json.dumps({"n": self._n}))
        self._saved_at = time.monotonic()

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        folder = Path(checkpoint_dir)
        self._leave()
        self._n = int(json.loads((folder / CHECKPOINT).read_text())["n"])
        self._files = read_files(folder / "state") or None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._leave()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._leave()

    def _begin(self, config: dict[str, Any]) -> None:
        """Be the trial of this point, not yet in a host: a checkpoint may be loaded first."""
        point = dict(config)
        number = int(point.pop("number"))
        self._trial = self._study.resolve(point, number)
        self._host: Any = None
        self._files = None
        self._n = 0
        self._saved_at = time.monotonic()

    def _join(self, *, recover: bool) -> None:
        """Take a seat, from the checkpoint that was loaded, or where a host that died left this membership.

        Raises:
            TrialError: the host did not return, or has nothing of this membership.
        """
        tree, deadline = dump(self._trial), time.monotonic() + RETURN_TIMEOUT_S
        if not recover:
            # unique to this membership: a cached actor of the same trial's past must not end it
            self._key = f"{self.trial_id}#{uuid.uuid4().hex[:8]}"
            self._host = ray.get(self._hosts.seat.remote(self.trial_id, tree))
        best_folder = str(Path(self._adapters) / self.trial_id)
        while True:
            try:
                joined = self._host.join.remote(
                    self._key, tree, files=self._files, n=self._n, recover=recover, best_folder=best_folder
                )
                if ray.get(joined):
                    self._files = None
                    return
            except ActorUnavailableError:
                if time.monotonic() < deadline:
                    time.sleep(0.5)
                    continue
            raise LostError(f"{self._trial.name}: the host is gone, and what it kept of this trial with it")

    def _advance(self) -> dict[str, Any]:
        """The next report; where the host died, from the host that takes its place."""
        for _ in range(1 + self._study.hosts.max_failures):
            try:
                report: dict[str, Any] = ray.get(self._host.advance.remote(self._key, self._n))
                return report
            except (RayActorError, KeyError):  # it died; or it died and was restarted, or the lease ran out
                self._join(recover=True)
        raise LostError(f"{self._trial.name}: its host died again and again")

    def _gave_up(self, error: RankloomError) -> dict[str, Any]:
        """The last report of a trial that a retry would not help."""
        progress = {"step": 0, "percent": 100.0, "train_loss": 0.0, "tokens": 0, "train_s": 0.0}
        return failed(self._n + 1, str(error), progress) | {"fatal": not isinstance(error, TrialError)}

    def _leave(self) -> None:
        if self._host is None:
            return
        # nobody waits for the answers: whoever can't be reached has forgotten this trial already
        self._host.leave.remote(self._key)
        self._hosts.unseat.remote(self.trial_id)
        self._host = None


class LostError(TrialError):
    """The trial has to begin again from its own checkpoint."""
