"""Intervals and paired tests over seeds and test rows; pure.

All methods are scored on the same test rows with the same seeds, so an outcome is a matrix: S seeds, N rows. Both are
samples: other seeds and other rows would give other results. Intervals resample both, and the test of a difference
counts the variation of both. Resamples: B. Labels: L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Matrix = NDArray[np.float64]
NUM_RESAMPLES = 2000
LEVEL = 0.05


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """The test of a difference between two methods."""

    difference: float
    """Mean of the first less the mean of the second."""
    p_value: float
    """Probability of such a difference, or a larger one, between two equal methods; two-sided."""
    test: str
    """seeds and rows, McNemar, or rows."""


class Bootstrap:
    """Resamples of S seeds and N rows, drawn independently; equal for all methods with as many of both.

    It is the pigeonhole bootstrap (Owen 2007, arXiv 0712.1111), for data that two crossed factors vary. With one seed
    its intervals are over rows alone.
    """

    def __init__(self, num_seeds: int, num_rows: int, *, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        seeds_BS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=NUM_RESAMPLES)
        rows_BN = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=NUM_RESAMPLES)
        self._seeds_BS, self._rows_BN = seeds_BS.astype(float), rows_BN.astype(float)

    def estimate_mean(self, values_SN: Matrix) -> Interval:
        """Return the mean with its 95 % interval."""
        means_B = ((self._seeds_BS @ values_SN) * self._rows_BN).sum(1) / values_SN.size
        return _make_interval(float(values_SN.mean()), means_B)

    def estimate_macro_f1(self, references: Sequence[str], predictions: Sequence[Sequence[str]]) -> Interval:
        """Return the mean over seeds of the macro F1, with its 95 % interval.

        Args:
            references: the label of each row.
            predictions: for each seed, the predicted label of each row.
        """
        names = dict.fromkeys([*references, *(label for each in predictions for label in each)])
        labels = {label: i for i, label in enumerate(names)}
        rows_BN = np.vstack([np.ones(len(references)), self._rows_BN])  # the first is the sample itself
        truth_NL = _encode_one_hot(references, labels)
        scores_SB = np.stack(
            [_compute_macro_f1(rows_BN, truth_NL, _encode_one_hot(each, labels)) for each in predictions]
        )
        means_B = (self._seeds_BS * scores_SB[:, 1:].T).sum(1) / len(predictions)
        return _make_interval(float(scores_SB[:, 0].mean()), means_B)


@dataclass(frozen=True)
class SeedVariance:
    """How much the difference between two methods varies with the seed, estimated over all methods."""

    mean_square: float
    df: int


def estimate_seed_variance(methods: Sequence[Matrix]) -> SeedVariance | None:
    """Return twice the mean square of method by seed, over methods [S, N] with equal seeds and rows.

    A pair has a few seeds only, from which a variance can't be told; all pairs together have many more. None: there are
    not two methods, or not two seeds.
    """
    if len(methods) < 2 or len(methods[0]) < 2:
        return None
    means_KS = np.stack([values_SN.mean(1) for values_SN in methods])
    rest_KS = means_KS - means_KS.mean(1, keepdims=True) - means_KS.mean(0, keepdims=True) + means_KS.mean()
    df = (means_KS.shape[0] - 1) * (means_KS.shape[1] - 1)
    return SeedVariance(2 * methods[0].shape[1] * float((rest_KS**2).sum()) / df, df)


def run_paired_test(first_SN: Matrix, second_SN: Matrix, pooled: SeedVariance | None = None) -> PairedTest:
    """Test whether two methods differ, on the same seeds and rows.

    With several seeds, the differences vary with the seed, with the row, and with both. This is the test of studies
    with several readers and cases (Obuchowski and Rockette 1995; Hillis 2007), where seeds are the readers: the
    variance of the mean difference is (MS_seed + max(MS_row - MS_rest, 0)) / (S N), with Satterthwaite's degrees of
    freedom. MS_seed is the largest of the pair's own, of `pooled`, and of MS_rest, which chance alone gives: a few
    seeds can agree by chance, and one method can be less stable than the others.

    With one seed: McNemar's exact test where every outcome is right or wrong, else a paired t test over the rows. Both
    are about these two runs, not about what other seeds would give.

    Args:
        pooled: the `seed_variance` of all methods; None: the pair's own alone.
    """
    differences_SN = first_SN - second_SN
    num_seeds, num_rows = differences_SN.shape
    mean = float(differences_SN.mean())
    if num_seeds == 1 and np.isin((first_SN, second_SN), (0.0, 1.0)).all():
        wins, losses = int((differences_SN > 0).sum()), int((differences_SN < 0).sum())
        p_value = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        return PairedTest(mean, float(p_value), "McNemar")
    test = "rows" if num_seeds == 1 else "seeds and rows"
    if not differences_SN.any() or num_rows == 1:
        return PairedTest(mean, 1.0, test)
    from_seeds, from_rows = _compute_mean_squares(differences_SN)
    df_seeds = max(1, num_seeds - 1)
    if pooled is not None and num_seeds > 1:
        from_seeds, df_seeds = max(from_seeds, pooled.mean_square), pooled.df
    variance = (from_seeds + from_rows) / differences_SN.size
    if variance == 0:  # the same difference everywhere
        return PairedTest(mean, 0.0, test)
    df = (from_seeds + from_rows) ** 2 / (from_seeds**2 / df_seeds + from_rows**2 / (num_rows - 1))
    return PairedTest(mean, float(2 * stats.t.sf(abs(mean) / math.sqrt(variance), df)), test)


def _compute_mean_squares(differences_SN: Matrix) -> tuple[float, float]:
    """Return the terms of `paired_test` that come from the pair's seeds and from the rows."""
    num_seeds, num_rows = differences_SN.shape
    by_seed_S, by_row_N = differences_SN.mean(1), differences_SN.mean(0)
    ms_row = num_seeds * float(by_row_N.var(ddof=1))
    if num_seeds == 1:
        return 0.0, ms_row
    rest_SN = differences_SN - by_seed_S[:, None] - by_row_N[None, :] + differences_SN.mean()
    ms_rest = float((rest_SN**2).sum()) / ((num_seeds - 1) * (num_rows - 1))
    ms_seed = num_rows * float(by_seed_S.var(ddof=1))
    return max(ms_seed, ms_rest), max(ms_row - ms_rest, 0.0)


def correct_by_holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values adjusted for their number by Holm's step-down method, in their order."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _make_interval(value: float, resampled_B: Matrix) -> Interval:
    low, high = np.percentile(resampled_B, [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
    return Interval(value, float(low), float(high))


def _encode_one_hot(texts: Sequence[str], labels: dict[str, int]) -> Matrix:
    return np.eye(len(labels))[[labels[text] for text in texts]]


def _compute_macro_f1(rows_BN: Matrix, truth_NL: Matrix, predicted_NL: Matrix) -> Matrix:
    """Return the mean F1 [B] over the labels that stand among a resample's truths or predictions."""
    right_BL = rows_BN @ (truth_NL * predicted_NL)
    counted_BL = rows_BN @ (truth_NL + predicted_NL)
    scores_BL = np.divide(2 * right_BL, counted_BL, out=np.zeros_like(right_BL), where=counted_BL > 0)
    return scores_BL.sum(1) / (counted_BL > 0).sum(1)
