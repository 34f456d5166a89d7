"""Reports: what a trial tells Ray Tune after each of its evaluations, in a host or in a run of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rankloom.events import CurvePoint

FAILED_LOSS = 1e9
"""The loss that a failed trial reports: worse than any, yet a number that every scheduler can compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialReport(CurvePoint):
    """A point of the trial's curve, and how the trial continues."""

    best_value: float | None = None
    """The best value of `search.metric` so far; None where the trial failed."""
    done: bool = False
    """No report follows. Ray Tune sets this key of a result itself when it stops a trial."""
    finished: bool = False
    """The trial came to its end by itself, and without an error."""
    error: str | None = None
    """Why it failed."""
    fatal: bool = False
    """The error is of the data, the base or the cluster, and would fail every trial of the study."""

    def with_costs(self, costs: Mapping[str, float]) -> TrialReport:
        """Return the report with what serving the adapter costs, as far as it was measured."""
        memory_bytes, latency_ms = (costs.get(name) for name in ("memory_bytes", "latency_ms"))
        return replace(self, memory_bytes=memory_bytes, latency_ms=latency_ms)


def costs_of(measured: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    """The costs as trials are compared by: a latency to two digits, for it differs by more from timing to timing."""
    costs = {name: float(measured[name]) for name in names if measured[name] is not None}
    return {name: float(f"{value:.2g}") if name == "latency_ms" else value for name, value in costs.items()}
