"""Intervals and tests against values that scipy, statsmodels and scikit-learn give, and against simulated methods."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from rankloom.comparison.statistics import (
    Bootstrap,
    Matrix,
    SeedVariance,
    correct_by_holm,
    estimate_seed_variance,
    run_paired_test,
)


def test_one_seed_of_right_and_wrong_rows_is_mcnemars_test() -> None:
    first, second = np.ones((1, 30)), np.ones((1, 30))
    first[0, :2], second[0, 2:10] = 0, 0
    found = run_paired_test(first, second)
    assert found.test == "McNemar"
    assert found.difference == pytest.approx(6 / 30)
    # statsmodels.stats.contingency_tables.mcnemar([[20, 8], [2, 0]], exact=True).pvalue
    assert found.p_value == pytest.approx(0.109375)
    assert run_paired_test(second, first).p_value == found.p_value
    assert run_paired_test(first, first).p_value == 1.0


def test_one_seed_of_numbers_is_a_paired_t_test() -> None:
    first = np.array([[1.1, 2.0, 0.7, 1.4, 1.9, 0.2]])
    second = np.array([[0.9, 1.5, 0.8, 1.0, 1.2, 0.1]])
    found = run_paired_test(first, second)
    assert found.test == "rows"
    assert found.p_value == pytest.approx(0.0521814, rel=1e-4)  # scipy.stats.ttest_rel(first[0], second[0]).pvalue


def test_several_seeds_count_the_variation_of_seeds_and_of_rows() -> None:
    differences = np.array([[1.0, 0.0, 1.0, 2.0], [3.0, 2.0, 2.0, 3.0]])
    # mean 1.75; MS_seed = 4 x 1.125 = 4.5, MS_row = 2 x 0.4166667, MS_rest = 0.5 / 3 = 0.1666667; variance of the mean
    # (4.5 + 0.6666667) / 8 = 0.6458333, t = 2.177607, df = 5.1666667^2 / (4.5^2 / 1 + 0.6666667^2 / 3) = 1.308698
    found = run_paired_test(differences, np.zeros_like(differences))
    assert found.test == "seeds and rows"
    assert found.difference == pytest.approx(1.75)
    assert found.p_value == pytest.approx(0.224485, rel=1e-4)  # 2 * scipy.stats.t.sf(2.177607, 1.308698)
    # rows alone would call it real: scipy.stats.ttest_1samp(differences.mean(0), 0).pvalue
    assert run_paired_test(differences.mean(0, keepdims=True), np.zeros((1, 4))).p_value == pytest.approx(
        0.0123076, rel=1e-4
    )


def simulated(rng: np.random.Generator, skills: list[float], seed_deviation: float) -> list[Matrix]:
    """Outcomes of methods on 150 rows with three seeds: rows are hard for all or for one method, and seeds differ."""
    ease_N, found = rng.normal(1, 1.5, 150), []
    for skill in skills:
        quirks_SN = rng.normal(0, seed_deviation, (3, 1)) + rng.normal(0, 0.5, (1, 150))
        found.append((rng.random((3, 150)) < 1 / (1 + np.exp(-ease_N - quirks_SN - skill))).astype(float))
    return found


def adjusted(methods: list[Matrix]) -> dict[tuple[int, int], float]:
    pooled, pairs = estimate_seed_variance(methods), list(combinations(range(len(methods)), 2))
    return dict(
        zip(
            pairs,
            correct_by_holm([run_paired_test(methods[i], methods[j], pooled).p_value for i, j in pairs]),
            strict=True,
        )
    )


@pytest.mark.parametrize("seed_deviation", [0.0, 0.4])
def test_equal_methods_are_seldom_told_apart(seed_deviation: float) -> None:
    rng = np.random.default_rng(0)
    wrong = sum(min(adjusted(simulated(rng, [0.0] * 6, seed_deviation)).values()) < 0.05 for _ in range(100))
    assert wrong <= 8  # 5 of 100 expected at most, in any of 15 pairs


def test_three_seeds_tell_a_worse_method_from_each_other() -> None:
    found = adjusted(simulated(np.random.default_rng(0), [0.0, 0.0, 0.0, -2.0], 0.1))
    assert all((p_value < 0.05) == (3 in pair) for pair, p_value in found.items())


def test_an_unstable_pair_is_held_to_its_own_seeds() -> None:
    steady = np.tile([1.0, 0.0], (2, 50))
    unstable = np.vstack([np.ones(100), np.tile([1.0, 0.0, 0.0, 0.0], 25)])
    pooled = SeedVariance(0.0, 9)
    assert run_paired_test(unstable, steady, pooled).p_value > 0.3


def test_a_seed_variance_needs_two_methods_and_two_seeds() -> None:
    values = np.tile([1.0, 0.0], (2, 5))
    assert estimate_seed_variance([values]) is None
    assert estimate_seed_variance([values[:1], values[:1]]) is None
    # of two methods it is the pair's own: 10 x var(by seed) of the differences, with one degree of freedom
    other = np.vstack([values[0], 1 - values[1] * 0])
    assert estimate_seed_variance([values, other]) == SeedVariance(pytest.approx(10 * np.var([0.0, -0.5], ddof=1)), 1)


def test_the_same_difference_everywhere_is_certain() -> None:
    assert run_paired_test(np.full((2, 5), 2.0), np.full((2, 5), 1.0)).p_value == 0.0


def test_holm() -> None:
    # statsmodels.stats.multitest.multipletests([0.01, 0.04, 0.03, 0.005], method="holm")[1]
    assert correct_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_by_holm([0.5, 0.6]) == [1.0, 1.0]
    assert correct_by_holm([]) == []


def test_an_interval_of_one_seed_is_the_bootstraps_over_rows() -> None:
    values = np.array([[1.0] * 80 + [0.0] * 20])
    found = Bootstrap(1, 100).estimate_mean(values)
    assert found.value == 0.8
    # normal approximation: 0.8 -+ 1.96 x sqrt(0.8 x 0.2 / 100)
    assert (found.low, found.high) == pytest.approx((0.7216, 0.8784), abs=0.015)


def test_seeds_that_differ_widen_an_interval() -> None:
    agree = np.tile([1.0, 0.0], (3, 50))
    differ = np.vstack([np.ones(100), np.tile([1.0, 0.0], 50), np.zeros(100)])
    narrow, wide = Bootstrap(3, 100).estimate_mean(agree), Bootstrap(3, 100).estimate_mean(differ)
    assert narrow.value == wide.value == 0.5
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_macro_f1_over_seeds() -> None:
    references = ["a", "a", "b", "c"]
    found = Bootstrap(2, 4).estimate_macro_f1(references, [["a", "b", "b", "c"], references])
    # sklearn.metrics.f1_score(references, predictions, average="macro") is 7/9 and 1
    assert found.value == pytest.approx((7 / 9 + 1) / 2)
    assert found.low <= found.value <= found.high <= 1.0
    assert Bootstrap(1, 4).estimate_macro_f1(references, [["a", "b", "b", "d"]]).value == pytest.approx(1 / 3)
