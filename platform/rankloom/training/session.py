"""Session: how a running trial talks to whoever launched it.

The loop knows this protocol alone. `LocalSession` keeps checkpoints in a folder of this process;
`rankloom.launch.ray_session` has the Ray Train one.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch

from rankloom.errors import TrialError
from rankloom.events import Event, OnEvent


class Session(Protocol):
    """One worker's view of its run. Methods that say so are called by every worker at the same step."""

    rank: int
    world_size: int
    device: torch.device

    def emit(self, event: Event) -> None:
        """Tell the user; only rank 0's events are shown."""

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The newest checkpoint's folder, None at a fresh start."""

    def best_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The folder of the checkpoint with the highest score."""

    def save_checkpoint(self, folder: Path | None, metrics: dict[str, float]) -> None:
        """Keep `folder` (None but on rank 0) if it is the latest or the best by metrics["score"]; all workers call."""

    def should_stop(self) -> bool:
        """Whether the user asked for a stop: the loop then saves a checkpoint and returns."""


class LocalSession:
    """A run in this process: checkpoints under `<run>/checkpoints/<step>`, the latest and the best are kept."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        run: Path,
        *,
        device: torch.device,
        on_event: OnEvent = lambda _: None,
        stop: threading.Event | None = None,
    ) -> None:
        self.device = device
        self.emit = on_event
        self._stop = stop or threading.Event()
        self._folder = run / "checkpoints"
        self._folder.mkdir(parents=True, exist_ok=True)

    def should_stop(self) -> bool:
        return self._stop.is_set()

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        yield max(self._scores(), key=lambda p: int(p.name), default=None)

    @contextmanager
    def best_checkpoint(self) -> Iterator[Path | None]:
        scores = self._scores()
        yield max(scores, key=lambda p: (scores[p], -int(p.name)), default=None)

    def save_checkpoint(self, folder: Path | None, metrics: dict[str, float]) -> None:
        assert folder is not None
        target = self._folder / str(int(metrics["step"]))
        for leftover in self._folder.glob(".staged-*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        staged = self._folder / f".staged-{target.name}"
        try:
            shutil.copytree(folder, staged)
            (staged / "metrics.json").write_text(json.dumps(metrics))
            if target.exists():  # the same step again after a resume
                shutil.rmtree(target)
            os.rename(staged, target)
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error  # the first of its files
            raise TrialError(
                f"could not write the checkpoint {target}: {reason}; earlier checkpoints are intact: make room, and "
                f"--resume goes on from the latest"
            ) from None
        with self.latest_checkpoint() as latest, self.best_checkpoint() as best:
            for old in self._scores():
                if old not in (latest, best):
                    shutil.rmtree(old)

    def _scores(self) -> dict[Path, float]:
        finished = (p for p in self._folder.iterdir() if p.name.isdigit() and (p / "metrics.json").is_file())
        return {p: self._score(p / "metrics.json") for p in finished}

    @staticmethod
    def _score(file: Path) -> float:
        try:
            return float(json.loads(file.read_text())["score"])
        except (ValueError, KeyError, TypeError) as error:
            raise TrialError(
                f"the checkpoint {file.parent} is damaged: {file.name}: {error}; remove that folder, and --resume "
                f"goes on from an earlier one, or from the start"
            ) from None
