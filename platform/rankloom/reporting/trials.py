"""Trials as reports see them: a study's, a single one, or those of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rankloom.events import CurvePoint
from rankloom.registry.scorecard import Scorecard


@dataclass(frozen=True, slots=True)
class Goal:
    """The measure that trials are ranked by."""

    name: str
    """loss, accuracy, or the name of the user's own function."""
    best: Literal["max", "min"]
    key: str
    """The field of `CurvePoint` that holds it."""

    def format(self, value: float | None) -> str:
        """Return a value as text; an accuracy in percent."""
        if value is None:
            return ""
        return f"{100 * value:.1f} %" if self.key == "accuracy" else f"{value:.4g}"

    @property
    def direction(self) -> str:
        """Which values are good, in words."""
        return "higher is better" if self.best == "max" else "lower is better"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedTrial:
    """A trial with what was measured of it."""

    name: str
    group: str
    """What colours distinguish: its method with its base's quantisation."""
    settings: str
    """Its values of the knobs, in short."""
    status: str
    value: float | None
    """Its best value of the goal on the validation rows."""
    best: CurvePoint | None
    curve: tuple[CurvePoint, ...] = ()
    branch: int | None = None
    """Its branch of the space; None: it was not drawn from it."""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    """Dotted name -> value."""
    costs: Mapping[str, float] = field(default_factory=dict)
    """memory_bytes and latency_ms, where measured."""
    on_front: bool = False
    is_baseline: bool = False
    score: Scorecard | None = None
    """Its measures on the test rows; None: it was not scored."""
    published: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """The time that a trial spent somewhere."""

    lane: str
    """Where: a slot of a host, or the trial's own process."""
    trial: str
    """The trial's name."""
    group: str
    start_s: float
    """Seconds since the study began."""
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A knob, for charts."""

    name: str
    is_log: bool
    choices: tuple[str, ...] | None
    """A choice's values as text; None: a range."""
    low: float
    high: float
    """Ends of a range; of a choice 0 and the number of the last value."""

    def holds(self, value: Any) -> bool:
        """Return whether a value is on the axis."""
        if self.choices is not None:
            return format_knob(value) in self.choices
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    def locate(self, value: Any) -> float:
        """Return a value's place on the axis: a choice's number, else the value."""
        return float(self.choices.index(format_knob(value))) if self.choices is not None else float(value)


def format_knob(value: Any) -> str:
    """Return a knob's value as short text."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
