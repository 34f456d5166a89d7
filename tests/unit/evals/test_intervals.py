"""The bootstrap interval is what resampling rows gives."""

from __future__ import annotations

import numpy as np
import pytest

from rankloom.evals.intervals import bootstrap_proportion


@pytest.mark.parametrize(("right", "n"), [(30, 40), (500, 1000)])
def test_equals_resampling_rows(right: int, n: int) -> None:
    rows = [True] * right + [False] * (n - right)
    found = bootstrap_proportion(rows)
    means = np.random.default_rng(1).choice(rows, size=(4000, n)).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    assert found.value == right / n
    assert found.low == pytest.approx(low, abs=1.01 / n + 0.005)
    assert found.high == pytest.approx(high, abs=1.01 / n + 0.005)
    assert found.low < found.value < found.high


def test_is_the_same_each_time() -> None:
    assert bootstrap_proportion([True, False, True] * 20) == bootstrap_proportion([True, False, True] * 20)


def test_certain_outcomes() -> None:
    found = bootstrap_proportion([True] * 5)
    assert (found.value, found.low, found.high) == (1, 1, 1)
