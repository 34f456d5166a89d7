"""Verdicts: a tie is never called a win, and the direction of a metric counts."""

from __future__ import annotations

from typing import Any

import pytest

from made_study import measures
from rankloom.registry.scorecard import Measures
from rankloom.reporting.verdict import contrast


def of(right: int, num_rows: int = 200, **changed: Any) -> Measures:
    return Measures.model_validate(measures(right, num_rows) | changed)


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome"), [(150, 100, "better"), (100, 150, "worse"), (110, 100, "tie"), (100, 100, "tie")]
)
def test_a_difference_within_its_interval_is_a_tie(ours: int, theirs: int, outcome: str) -> None:
    found = contrast(of(ours), of(theirs))
    assert found.outcome == outcome
    words = found.make_sentence("A", "B").split()
    assert [each for each in ("better", "worse", "tied") if each in words] == [outcome.replace("tie", "tied")]


def test_more_rows_make_a_win_of_a_tie() -> None:
    assert contrast(of(110), of(100)).outcome == "tie"
    assert contrast(of(5500, 10_000), of(5000, 10_000)).outcome == "better"


def test_the_interval_is_newcombes() -> None:
    # the first example of Newcombe (1998), his method 10: 56 of 70 against 48 of 80, [0.0524, 0.3339]
    assert contrast(of(56, 70), of(48, 80)).difference == "a difference of +20.0 points [+5.2, +33.4]"


def test_a_perfect_score_on_few_rows_is_not_certain() -> None:
    certain = {"value": 1.0, "low": 1.0, "high": 1.0}  # as a bootstrap has it
    assert contrast(of(5, 5, accuracy=certain), of(4, 5)).outcome == "tie"
    assert contrast(of(10, 10, accuracy=certain), of(7, 10)).outcome == "tie"


def test_a_metric_that_is_best_at_its_minimum() -> None:
    def own(value: float, low: float | None, high: float | None) -> Measures:
        return of(100, metric={"name": "m:wer", "best": "min", "value": value, "low": low, "high": high})

    assert contrast(own(0.1, 0.05, 0.15), own(0.5, 0.4, 0.6)).outcome == "better"
    assert contrast(own(0.5, 0.4, 0.6), own(0.1, 0.05, 0.15)).outcome == "worse"
    assert contrast(own(0.3, 0.1, 0.5), own(0.4, 0.2, 0.6)).outcome == "tie"
    assert contrast(own(0.1, None, None), own(0.5, None, None)).outcome == "unknown"


def test_losses_alone_decide_nothing() -> None:
    ours, theirs = of(1, accuracy=None, loss=0.5), of(1, accuracy=None, loss=0.9)
    found = contrast(ours, theirs)
    assert found.outcome == "unknown"
    assert "may be chance" in found.make_sentence("A", "B")
    assert contrast(ours, ours).outcome == "tie"
