"""Finalists: the driver sends them to a host to be scored on the test rows, and gets scores back; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankloom.config import TrialConfig
from rankloom.registry.scorecard import Scorecard


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


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalistScore:
    """A finalist's scorecard, or its error."""

    scorecard: Scorecard | None = None
    published: list[str] = field(default_factory=list)
    """The published versions, such as `tickets@1`."""
    error: str | None = None
