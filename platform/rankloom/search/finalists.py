"""Finalists: the driver sends them to a host to be scored on the test rows, and gets scores back; no torch.

Each one's result on every test row goes to a file in the study's folder, `rows/<trial>.parquet`, so that two trials can
be compared row by row; the untuned base's is beside them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from rankloom.config import TrialConfig
from rankloom.config.study import make_host_key
from rankloom.registry.scorecard import Scorecard

ROWS = "rows"
"""Folder in the study's folder with the results on each test row."""


def get_rows_file(study: Path, trial_id: str) -> Path:
    """Return the file of a finalist's results on the test rows."""
    return study / ROWS / f"{trial_id}.parquet"


def get_base_rows_file(study: Path, trial: TrialConfig) -> Path:
    """Return the file of the results of a trial's untuned base; trials that can share a host have the same one."""
    return study / ROWS / f"base-{hashlib.sha256(make_host_key(trial).encode()).hexdigest()[:16]}.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """A trial among the best, with its adapter."""

    trial: TrialConfig
    folder: str
    """Its adapter's folder."""
    names: list[str]
    """Names to publish it under."""
    steps: int
    tokens: int
    train_s: float
    memory_bytes: int
    """Peak of the host that trained it."""
    own_run: Scorecard | None = None
    """The scorecard of its own run; None: it shared a host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalistScore:
    """A finalist's scorecard, or its error."""

    scorecard: Scorecard | None = None
    published: list[str] = field(default_factory=list)
    """The published versions, such as `tickets@1`."""
    error: str | None = None
