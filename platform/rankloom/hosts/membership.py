"""Membership: a trial's state in a host's process, and the snapshots that it can continue from.

    <scratch>/<key>/<n>/    the member's complete state at its n-th report; member.json, written last, has the part
                            that `TrialHost.save` does not write
    <scratch>/<key>/<n>/best/    its adapter, where report n was the best so far

This module handles only files; `slots.py` decides who trains, and `host_loop.py` works on the host.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rankloom.config import TrialConfig
from rankloom.hosts.reports import TrialReport
from rankloom.hosts.slots import Candidate

Files = dict[str, bytes]

META, BEST = "member.json", "best"


@dataclass
class Progress:
    """How far a trial has come, as member.json keeps it."""

    best_value: float | None = None
    """The best value of `search.metric` so far; None before the first."""
    evals_since_best: int = 0
    step: int = 0
    tokens: int = 0
    train_s: float = 0.0
    """Its share of the host's training time."""
    train_loss: float = 0.0
    costs: dict[str, float] = field(default_factory=dict)
    """The costs in `search.objectives`, after its first adapter is measured."""


@dataclass
class Membership:
    """A trial's membership: its slot state, the reports that its trial may still ask for, and its progress."""

    candidate: Candidate
    trial: TrialConfig
    folder: Path
    """The folder of its snapshots."""
    best_folder: Path | None
    """The folder for its best adapter; None: the adapter is not kept."""
    reports: dict[int, TrialReport] = field(default_factory=dict)
    """By number."""
    heard_at: float = 0.0
    """Monotonic time of its trial's last call."""
    num_callers: int = 0
    """Calls of its trial that wait for a report."""
    progress: Progress = field(default_factory=Progress)
    failure: str | None = None
    """Why it failed; None: it did not."""

    @property
    def key(self) -> str:
        return self.candidate.key

    @property
    def trial_id(self) -> str:
        return self.key.partition("#")[0]

    @property
    def start(self) -> Path | None:
        """The snapshot of the last report, to admit it from; None before the first report."""
        made = self.candidate.made
        return self.get_folder(made) if made and self.has(made) else None

    def get_folder(self, n: int) -> Path:
        return self.folder / str(n)

    def has(self, n: int) -> bool:
        """Return whether the snapshot of report n exists and is complete."""
        return (self.get_folder(n) / META).is_file()

    def take(self, n: int, files: Files | None) -> None:
        """Replace all snapshots by the given one of report n; None: by none."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if files:
            write_files(self.get_folder(n), files)

    def keep(self, n: int) -> None:
        """Remove all snapshots but one: a dead host made the others ahead of the driver, perhaps partially."""
        for other in self.folder.iterdir() if self.folder.is_dir() else ():
            if other != self.get_folder(n):
                shutil.rmtree(other)

    def accept(self, n: int) -> None:
        """Record that the driver has report n, and remove earlier reports and snapshots."""
        if n <= self.candidate.accepted:
            return
        self.candidate.accepted = n
        for earlier in [each for each in self.reports if each < n]:
            del self.reports[earlier]
            shutil.rmtree(self.get_folder(earlier), ignore_errors=True)

    def save(self, n: int) -> None:
        """Complete the snapshot of report n."""
        meta = asdict(self.progress) | {"trial": self.trial_id}
        (self.get_folder(n) / META).write_text(json.dumps(meta))  # last: a snapshot without it is incomplete

    def rewind(self) -> None:
        """Reset the progress to the last snapshot's."""
        self.progress = Progress()
        if self.start is not None:
            meta = json.loads((self.start / META).read_text())
            trial = meta.pop("trial")
            self.progress = Progress(**meta)
            if trial != self.trial_id:  # another trial's weights: their best adapter is not here
                self.progress = replace(self.progress, best_value=None, evals_since_best=0)

    def report(self, num_steps: int, loss: float, accuracy: float | None, metric: float | None) -> TrialReport:
        """Return the next report of a trial that continues; `num_steps` is its budget."""
        now = self.progress
        report = TrialReport(
            n=self.candidate.made + 1,
            step=now.step,
            percent=100 * min(1.0, now.step / num_steps) if num_steps else 100.0,
            loss=loss,
            accuracy=accuracy,
            metric=metric,
            train_loss=now.train_loss,
            tokens=now.tokens,
            train_s=now.train_s,
            best_value=now.best_value,
        )
        return report.add_costs(now.costs)

    def publish_best(self, n: int) -> None:
        """Replace the adapter in `best_folder` by that of report n. A second call for the same report does nothing.

        A reader may find no adapter for a moment, but never a partial one.
        """
        source, target = self.get_folder(n) / BEST, self.best_folder
        if target is None or not source.is_dir():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=".staged-"))
        shutil.copytree(source, staged, dirs_exist_ok=True)
        staged.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)
        shutil.rmtree(source)


def read_files(folder: Path) -> Files:
    """Return a snapshot's files, without the best adapter, which `publish_best` copies."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder).parts[0] != BEST
    }


def write_files(folder: Path, files: Files) -> None:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
