"""How far a proportion or a mean measured on n rows can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankloom.registry.scorecard import Proportion

NUM_RESAMPLES = 2000


def bootstrap_proportion(right: Sequence[bool], *, seed: int = 0) -> Proportion:
    """Return the proportion of true values in `right` with its 95 % bootstrap interval.

    The number of right rows in a resample of n rows with replacement is binomial, so it is drawn directly.
    """
    n = len(right)
    value = sum(right) / n
    resampled = np.random.default_rng(seed).binomial(n, value, size=NUM_RESAMPLES) / n
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Proportion(value=value, low=float(low), high=float(high))


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean, and the ends of its 95 % bootstrap interval."""
    rng, array = np.random.default_rng(seed), np.asarray(values, dtype=float)
    means = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), float(low), float(high)
