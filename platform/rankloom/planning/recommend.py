"""A method for a budget of memory, with the rows that the choice rests on."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from rankloom.planning.forecast import MethodPlan
from rankloom.training.memory_plan import format_gb

Preference = Literal["accuracy", "memory", "speed"]
IN_4_BITS = (
    "no row here compares 4-bit bases; QLoRA's paper finds them equal on its tasks (arXiv 2305.14314), later work "
    "worse on newer models (arXiv 2404.14047)"
)


@dataclass(frozen=True)
class Recommendation:
    """A method, and why."""

    label: str | None
    """The recipe; None: nothing fits."""
    reasons: tuple[str, ...]
    rows: tuple[str, ...]
    """The measured rows that the reasons rest on."""


def recommend(methods: Sequence[MethodPlan], prefer: Preference) -> Recommendation:
    """Return the method to take among those that fit.

    accuracy: the best by the packaged rows, an unquantised base before a 4-bit one; memory: the lowest peak; speed: the
    most tokens/s.
    """
    fitting = [method for method in methods if method.fits is not False]
    if not fitting:
        least = min(methods, key=lambda each: each.memory.peak)
        need = f"{least.label} takes the least, {format_gb(least.memory.peak)}"
        return Recommendation(None, (f"no method fits; {need}",), ())
    if prefer == "memory":
        best = min(fitting, key=lambda each: each.memory.peak)
        return Recommendation(best.label, (f"its peak of {format_gb(best.memory.peak)} is the lowest",), ())
    if prefer == "speed":
        timed = [(each.speed, each) for each in fitting if each.speed is not None]
        if not timed:
            return Recommendation(None, ("no measured row for this device; measure with --calibrate",), ())
        speed, best = max(timed, key=lambda pair: pair[0].tokens_per_s)
        return Recommendation(
            best.label, (f"{speed.tokens_per_s:.3g} tokens/s are the most of those that fit",), (speed.source,)
        )
    return _recommend_accurate(fitting)


def _recommend_accurate(fitting: Sequence[MethodPlan]) -> Recommendation:
    evidence = {row["method"]: row for row in _read_evidence()}
    known = {each.label: evidence.get(each.label.removeprefix("q")) for each in fitting}
    ranked = [(label, row) for label, row in known.items() if row is not None]
    if not ranked:
        return Recommendation(None, ("no packaged row has the accuracy of a method that fits",), ())
    label, row = max(ranked, key=lambda pair: (not pair[0].startswith("q"), float(pair[1]["accuracy"])))
    best = next(each for each in fitting if each.label == label)
    reasons = [f"it fits with a peak of {format_gb(best.memory.peak)}"]
    reasons.append(
        f"{float(row['accuracy']):.1%} is the best of the rows' methods that fit, by one seed: close to a tie"
    )
    if label.startswith("q"):
        reasons.append(IN_4_BITS)
    reasons.append("rankloom compare measures it on your data")
    rows = tuple(f"{name} {float(each['accuracy']):.1%}: {each['source']}" for name, each in evidence.items())
    return Recommendation(label, tuple(reasons), rows)


def _read_evidence() -> list[dict[str, str]]:
    with (files("rankloom.planning") / "evidence.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
