"""Reports: a trial's results for Ray Tune after each of its evaluations, from a host or a dedicated run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from rankloom.events import CurvePoint

FAILED_LOSS = 1e9
"""The loss that a failed trial reports: worse than any real loss, but finite, so that schedulers can compare it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialReport(CurvePoint):
    """A point of the trial's curve, and how the trial continues."""

    best_value: float | None = None
    """The best value of `search.metric` so far; None where the trial failed."""
    done: bool = False
    """Whether this is the last report. Ray Tune sets this key of a result itself when it stops a trial."""
    finished: bool = False
    """Whether the trial reached its end by itself and without an error."""
    error: str | None = None
    """Why it failed; None: it did not."""
    fatal: bool = False
    """Whether the error comes from the data, the base or the cluster, and would fail every trial of the study."""

    def add_costs(self, costs: Mapping[str, float]) -> TrialReport:
        """Return the report with the adapter's serving costs, where they were measured."""
        memory_bytes, latency_ms = (costs.get(name) for name in ("memory_bytes", "latency_ms"))
        return replace(self, memory_bytes=memory_bytes, latency_ms=latency_ms)


def round_costs(measured: Mapping[str, float | None], names: Iterable[str]) -> dict[str, float]:
    """Return the costs for comparing trials: a latency has two digits, because repeated timings differ by more."""
    costs = {name: float(value) for name in names if (value := measured[name]) is not None}
    return {name: float(f"{value:.2g}") if name == "latency_ms" else value for name, value in costs.items()}
