"""Finalists: what the driver hands to a host to be scored on the test rows, and what comes back; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankloom.config import TrialConfig
from rankloom.registry.scorecard import Scorecard


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """A trial that is among the best, with its adapter."""

    trial: TrialConfig
    folder: str
    """Its adapter."""
    names: list[str]
    """To publish it under."""
    steps: int
    tokens: int
    train_s: float
    memory_bytes: int
    """Peak of the host that trained it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalistScore:
    """How a finalist did: a scorecard, or an error."""

    scorecard: Scorecard | None = None
    published: list[str] = field(default_factory=list)
    """Refs of the registry."""
    error: str | None = None
