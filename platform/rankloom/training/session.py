"""Session: the interface between a running trial and its launcher.

The loop knows this protocol alone. `LocalSession` implements it for a run in this process, and
`rankloom.launch.ray_session` for Ray Train.
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
    """One worker's view of its run."""

    rank: int
    world_size: int
    device: torch.device

    def emit(self, event: Event) -> None:
        """Report an event to the user; only rank 0's events are shown."""

    def open_latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """Yield the folder of the newest checkpoint, or None before the first."""

    def open_best_checkpoint(self) -> AbstractContextManager[Path | None]:
        """Yield the folder of the checkpoint with the highest score, or None before the first."""

    def save_checkpoint(self, folder: Path | None, metrics: dict[str, float]) -> None:
        """Keep a checkpoint while it is the latest or the best one; every worker calls at the same step.

        Args:
            folder: the checkpoint's files on rank 0; None on the other ranks.
            metrics: "step", and "score", where higher is better.

        Raises:
            TrialError: the checkpoint can't be written.
        """

    def should_stop(self) -> bool:
        """Return whether the user asked for a stop; the loop then saves a checkpoint and returns."""


class LocalSession:
    """A run in this process; it keeps the latest and the best checkpoint under `<run>/checkpoints/<step>`."""

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
    def open_latest_checkpoint(self) -> Iterator[Path | None]:
        yield max(self._read_scores(), key=lambda p: int(p.name), default=None)

    @contextmanager
    def open_best_checkpoint(self) -> Iterator[Path | None]:
        scores = self._read_scores()
        yield max(scores, key=lambda p: (scores[p], -int(p.name)), default=None)

    def save_checkpoint(self, folder: Path | None, metrics: dict[str, float]) -> None:
        assert folder is not None
        target = self._folder / str(int(metrics["step"]))
        for leftover in self._folder.glob(".staged-*"):  # a killed run left it
            shutil.rmtree(leftover, ignore_errors=True)
        staged = self._folder / f".staged-{target.name}"
        try:
            shutil.copytree(folder, staged)
            (staged / "metrics.json").write_text(json.dumps(metrics))
            if target.exists():  # a resumed run reached the step again
                shutil.rmtree(target)
            os.rename(staged, target)
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error  # the reason of the first file
            raise TrialError(
                f"could not write the checkpoint {target}: {reason}; earlier checkpoints are intact: make room, and "
                f"--resume continues from the latest"
            ) from None
        with self.open_latest_checkpoint() as latest, self.open_best_checkpoint() as best:
            for old in self._read_scores():
                if old not in (latest, best):
                    shutil.rmtree(old)

    def _read_scores(self) -> dict[Path, float]:
        finished = (p for p in self._folder.iterdir() if p.name.isdigit() and (p / "metrics.json").is_file())
        return {p: self._score(p / "metrics.json") for p in finished}

    @staticmethod
    def _score(file: Path) -> float:
        try:
            return float(json.loads(file.read_text())["score"])
        except (ValueError, KeyError, TypeError) as error:
            raise TrialError(
                f"the checkpoint {file.parent} is damaged: {file.name}: {error}; remove that folder, and --resume "
                f"continues from an earlier one, or from the start"
            ) from None
