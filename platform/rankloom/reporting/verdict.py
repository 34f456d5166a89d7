"""Verdicts: whether one result on the test rows is better than another, or a tie. A tie is never called a win.

Both results come from one set of rows, whose single answers are not kept. So the interval of the difference is that of
two independent samples, which is wider than that of a paired test.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, sqrt
from typing import Literal

from rankloom.registry.scorecard import Measures, MetricValue, Proportion

Z = 1.959964
"""Standard deviations that hold 95 % of a normal distribution."""
Outcome = Literal["better", "worse", "tie", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A result beside another on the same test rows."""

    measure: str
    """accuracy, exact match, the name of the user's metric, or loss."""
    ours: str
    theirs: str
    difference: str
    """The difference with its 95 % interval, as text; empty where there is no interval."""
    outcome: Outcome
    """unknown: the values differ, but no interval says whether by more than chance."""

    def make_sentence(self, subject: str, other: str) -> str:
        """Return the verdict in a sentence."""
        values = f"{self.measure} {self.ours} against {self.theirs}"
        if self.outcome == "tie":
            return f"{subject} and {other} are tied on the test rows: {values}, {self.difference}."
        if self.outcome == "unknown":
            return (
                f"{subject} and {other} differ on the test rows, {values}; no interval was measured, so the difference "
                f"may be chance."
            )
        return f"{subject} is {self.outcome} than {other} on the test rows: {values}, {self.difference}."


def contrast(ours: Measures, theirs: Measures) -> Contrast:
    """Compare two results by the user's metric, else by accuracy, exact match or, without these, by loss."""
    mine, other = ours.metric, theirs.metric
    if mine is not None and other is not None and mine.name == other.name:
        return _contrast_metrics(mine, other)
    for field in ("accuracy", "exact_match"):
        share, base = getattr(ours, field), getattr(theirs, field)
        if share is not None and base is not None:
            spans = _get_wilson_span(share.value, ours.num_rows), _get_wilson_span(base.value, theirs.num_rows)
            return _contrast_shares(field.replace("_", " "), *spans)
    outcome: Outcome = "tie" if ours.loss == theirs.loss else "unknown"
    return Contrast(
        measure="loss", ours=f"{ours.loss:.4f}", theirs=f"{theirs.loss:.4f}", difference="", outcome=outcome
    )


def _contrast_shares(measure: str, ours: Proportion, theirs: Proportion) -> Contrast:
    low, high = _get_interval(ours, theirs)
    change = 100 * (ours.value - theirs.value)
    return Contrast(
        measure=measure,
        ours=f"{100 * ours.value:.1f} %",
        theirs=f"{100 * theirs.value:.1f} %",
        difference=f"a difference of {change:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]",
        outcome=_decide(low, high),
    )


def _contrast_metrics(ours: MetricValue, theirs: MetricValue) -> Contrast:
    texts = {"measure": ours.name, "ours": f"{ours.value:.4g}", "theirs": f"{theirs.value:.4g}"}
    if ours.low is None or ours.high is None or theirs.low is None or theirs.high is None:
        return Contrast(**texts, difference="", outcome="tie" if ours.value == theirs.value else "unknown")
    low, high = _get_interval(
        Proportion(value=ours.value, low=ours.low, high=ours.high),
        Proportion(value=theirs.value, low=theirs.low, high=theirs.high),
    )
    change = f"a difference of {ours.value - theirs.value:+.4g} [{low:+.4g}, {high:+.4g}]"
    outcome = _decide(low, high) if ours.best == "max" else _decide(-high, -low)
    return Contrast(**texts, difference=change, outcome=outcome)


def _get_wilson_span(share: float, num_rows: int) -> Proportion:
    """Return a share with Wilson's interval, which also a share of 0 or 1 of few rows has."""
    middle = (share + Z**2 / (2 * num_rows)) / (1 + Z**2 / num_rows)
    half = Z * sqrt(share * (1 - share) / num_rows + Z**2 / (4 * num_rows**2)) / (1 + Z**2 / num_rows)
    return Proportion(value=share, low=middle - half, high=middle + half)


def _get_interval(ours: Proportion, theirs: Proportion) -> tuple[float, float]:
    """Return the ends of the 95 % interval of the difference, after Newcombe (1998)."""
    change = ours.value - theirs.value
    down = hypot(ours.value - ours.low, theirs.high - theirs.value)
    up = hypot(ours.high - ours.value, theirs.value - theirs.low)
    return change - down, change + up


def _decide(low: float, high: float) -> Outcome:
    return "better" if low > 0 else "worse" if high < 0 else "tie"
