"""The studies that a comparison trains its methods in: one that tries learning rates, and one over the seeds.

Both are studies without a searcher: their trials are warm starts, in the order of the methods, and all run to their
end. What can share a base does, as in any study.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankloom.config import StudyConfig, parse
from rankloom.config.compare import CompareConfig, MethodChoice
from rankloom.config.space import Tree, merge
from rankloom.search.leaderboard import Leaderboard, TrialState, rank

COMPARISONS, COMPARE, RESULT = "comparisons", "compare.yaml", "result.json"
"""The folder of all comparisons, and in that of one its config and, once it is done, its result."""


def get_comparison_folder(comparison: CompareConfig) -> Path:
    """Return the comparison's folder, which holds its studies too."""
    return Path(comparison.baseline.output.root) / COMPARISONS / comparison.name


def build_rates_study(comparison: CompareConfig) -> StudyConfig:
    """Return the study that trains each method at each of its learning rates, with the first seed."""
    seed = comparison.seeds[0]
    starts = [_start(comparison, m, seed, rate) for m in comparison.methods for rate in comparison.list_rates(m)]
    return _build_study(comparison, f"{comparison.name}-rates", starts, publish=False)


def build_seeds_study(comparison: CompareConfig, rates: Mapping[str, float]) -> StudyConfig:
    """Return the study that trains each method with each seed.

    Args:
        rates: method -> its learning rate.
    """
    starts = [_start(comparison, m, seed, rates[m.label]) for m in comparison.methods for seed in comparison.seeds]
    return _build_study(comparison, comparison.name, starts, publish=comparison.publish)


def choose_rates(comparison: CompareConfig, leaderboard: Leaderboard) -> tuple[dict[str, float], list[str]]:
    """Return each method's learning rate with the best validation result, and notes on those to be doubted."""
    rates, notes = {}, []
    for choice in comparison.methods:
        tried = comparison.list_rates(choice)
        best = next((trial for trial in leaderboard.rank_trials() if trial.method == choice.label), None)
        if best is None:
            rates[choice.label] = choice.learning_rate
            notes.append(
                f"{choice.label}: every learning rate failed; the recommended {choice.learning_rate:g} is used"
            )
            continue
        rates[choice.label] = rate = best.config.optim.learning_rate
        if rate in (tried[0], tried[-1]):
            end = "lowest" if rate == tried[0] else "highest"
            notes.append(f"{choice.label}: its best learning rate, {rate:g}, is the {end} tried; another may be better")
    return rates, notes


def group_by_method(comparison: CompareConfig, leaderboard: Leaderboard) -> dict[str, list[TrialState]]:
    """Return method -> its trials, in the order of their starts."""
    trials = sorted(leaderboard.trials.values(), key=lambda trial: trial.number)
    return {m.label: [trial for trial in trials if trial.method == m.label] for m in comparison.methods}


def rank_methods(comparison: CompareConfig, leaderboard: Leaderboard) -> list[str]:
    """Return the methods by their mean result on the validation rows over the seeds, the best first.

    A method with fewer trained seeds comes after those with more; one without any is left out.
    """
    search, places = leaderboard.study.search, {}
    for label, trials in group_by_method(comparison, leaderboard).items():
        candidates = {trial.id for trial in leaderboard.list_candidates()}
        best = [
            rank(point, search) for t in trials if t.id in candidates and (point := t.find_best(search)) is not None
        ]
        if best:
            means = tuple(sum(values) / len(best) for values in zip(*best, strict=True))
            places[label] = (-len(best), *means)
    return sorted(places, key=lambda label: places[label])


def choose_names_of_best(comparison: CompareConfig, trial: TrialState, leaderboard: Leaderboard) -> list[str]:
    """Return the names to publish a trial under: `<comparison>-<method>` for the method's best, else none."""
    mine = next(other for other in leaderboard.list_candidates() if other.method == trial.method)
    return [f"{comparison.name}-{trial.method}"] if trial is mine else []


def _start(comparison: CompareConfig, choice: MethodChoice, seed: int, rate: float) -> Tree:
    return {"name": choice.label} | comparison.place(choice, seed, rate)


def _build_study(comparison: CompareConfig, name: str, starts: list[Tree], *, publish: bool) -> StudyConfig:
    output = comparison.baseline.output
    paths = {"root": str(get_comparison_folder(comparison)), "registry": output.registry_root}
    tree: dict[str, Any] = {
        "name": name,
        "trial": merge(comparison.trial, {"output": paths}),
        "space": starts[:1],
        "search": {
            "num_trials": len(starts), "warm_start": starts, "metric": comparison.metric, "mode": comparison.mode,
        },
        "scheduler": {"type": "fifo"},
        "hosts": comparison.hosts,
        "final": {"top_k": len(starts), "publish": publish},
    }  # fmt: skip
    return parse(StudyConfig, tree, "comparison")
