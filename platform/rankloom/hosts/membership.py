"""Membership: what a host's process knows of a trial in it, and the snapshots that it can return to.

    <scratch>/<key>/<n>/    all that the member was at its n-th report; member.json, which comes last, is the part
                            that is not the host's own
    <scratch>/<key>/<n>/best/    its adapter, where report n was the best so far

Files only; who sits when is `slots.py`, what is done with the host `host_loop.py`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankloom.config import TrialConfig
from rankloom.hosts.reports import TrialReport
from rankloom.hosts.slots import Candidate

Files = dict[str, bytes]

META, BEST = "member.json", "best"
BEGINNING: dict[str, Any] = {
    "best_value": None,
    "evals_since_best": 0,
    "step": 0,
    "tokens": 0,
    "train_s": 0.0,
    "train_loss": 0.0,
    "costs": {},
}
"""What of a member is not the host's to save, as it is at the start."""


@dataclass
class Membership:
    """A trial's membership: its seat, its reports that may still be asked for, and how far it is."""

    candidate: Candidate
    trial: TrialConfig
    folder: Path
    """For its snapshots."""
    best_folder: Path | None
    """Where its best adapter goes."""
    reports: dict[int, TrialReport] = field(default_factory=dict)
    heard_at: float = 0.0
    num_callers: int = 0
    best_value: float | None = None
    evals_since_best: int = 0
    step: int = 0
    tokens: int = 0
    train_s: float = 0.0
    """Its share of the time that the host trained."""
    train_loss: float = 0.0
    costs: dict[str, float] = field(default_factory=dict)
    """Those of `search.objectives`, once its first adapter was measured."""
    failure: str | None = None

    @property
    def key(self) -> str:
        return self.candidate.key

    @property
    def trial_id(self) -> str:
        return self.key.partition("#")[0]

    @property
    def start(self) -> Path | None:
        """The snapshot to be admitted from: of the last report; None at the very beginning."""
        made = self.candidate.made
        return self.snapshot(made) if made and self.has(made) else None

    def snapshot(self, n: int) -> Path:
        return self.folder / str(n)

    def has(self, n: int) -> bool:
        """Whether the snapshot of report n is there, and whole."""
        return (self.snapshot(n) / META).is_file()

    def take(self, n: int, files: Files | None) -> None:
        """Have the given snapshot alone; None: nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if files:
            write_files(self.snapshot(n), files)

    def keep(self, n: int) -> None:
        """Forget all but one snapshot: what a dead host made ahead of the driver, perhaps half-written."""
        for other in self.folder.iterdir() if self.folder.is_dir() else ():
            if other != self.snapshot(n):
                shutil.rmtree(other)

    def accept(self, n: int) -> None:
        """The driver has report n: the earlier ones are over."""
        if n <= self.candidate.accepted:
            return
        self.candidate.accepted = n
        for earlier in [each for each in self.reports if each < n]:
            del self.reports[earlier]
            shutil.rmtree(self.snapshot(earlier), ignore_errors=True)

    def save(self, n: int) -> None:
        """Complete the snapshot of report n."""
        meta = {name: getattr(self, name) for name in BEGINNING} | {"trial": self.trial_id}
        (self.snapshot(n) / META).write_text(json.dumps(meta))  # last: a snapshot without it is half-written

    def rewind(self) -> None:
        """Be where the last snapshot is."""
        meta = dict(BEGINNING)
        if self.start is not None:
            meta = json.loads((self.start / META).read_text())
            if meta.pop("trial") != self.trial_id:
                meta |= {"best_value": None, "evals_since_best": 0}  # another's weights: no adapter of them is kept yet
        for name, value in meta.items():
            setattr(self, name, value)

    def report(self, num_steps: int, loss: float, accuracy: float | None, metric: float | None) -> TrialReport:
        """Return the next report, of a trial that continues; `num_steps` is its budget."""
        report = TrialReport(
            n=self.candidate.made + 1,
            step=self.step,
            percent=100 * min(1.0, self.step / num_steps) if num_steps else 100.0,
            loss=loss,
            accuracy=accuracy,
            metric=metric,
            train_loss=self.train_loss,
            tokens=self.tokens,
            train_s=self.train_s,
            best_value=self.best_value,
        )
        return report.with_costs(self.costs)

    def publish_best(self, n: int) -> None:
        """Put the adapter of report n in the place of an earlier one; asked for twice, it is there already.

        A reader may find none for a moment, never a half.
        """
        source, target = self.snapshot(n) / BEST, self.best_folder
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
    """A snapshot as bytes, without the adapter that goes its own way."""
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
