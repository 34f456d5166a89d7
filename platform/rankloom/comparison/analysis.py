"""From what a comparison's studies left to its result: rows on disk, scorecards and costs in, table and verdict out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rankloom.comparison.outcomes import Outcomes, choose_measure
from rankloom.comparison.results import CompareResult, MethodResult
from rankloom.comparison.studies import get_comparison_folder, group_by_method, rank_methods
from rankloom.comparison.table import (
    ScoredSeed,
    add_orders,
    build_base_result,
    build_method_result,
    compare_pairs,
    find_servers,
)
from rankloom.comparison.verdict import write_verdict
from rankloom.config.compare import CompareConfig
from rankloom.errors import TrialError
from rankloom.registry.scorecard import MethodCost
from rankloom.search.dedicated import ADAPTERS
from rankloom.search.finalists import get_base_rows_file, get_rows_file
from rankloom.search.leaderboard import Leaderboard, TrialState
from rankloom.search.results import ScoredTrial, StudyResult


def build_result(
    comparison: CompareConfig,
    trained: StudyResult,
    leaderboard: Leaderboard,
    tuning: Leaderboard | None,
    costs: Mapping[str, MethodCost],
    notes: Sequence[str] = (),
) -> CompareResult:
    """Return the table, the tests and the verdict of what the studies left.

    Args:
        trained: the result of the study over the seeds, and `leaderboard` its trials.
        tuning: the trials that chose the learning rates; None: there were none.

    Raises:
        TrialError: a study's files are gone or damaged.
    """
    folder = Path(trained.folder)
    scored = {each.trial: each for each in trained.finalists}
    trials = group_by_method(comparison, leaderboard)
    seeds = {label: _list_scored(mine, scored) for label, mine in trials.items()}
    outcomes = {
        label: Outcomes.read([get_rows_file(folder, each.trial.id) for each in found])
        for label, found in seeds.items()
        if found
    }
    first = next((found[0].scorecard for found in seeds.values() if found), None)
    if first is None:
        raise TrialError(f"no trial of {comparison.name!r} was scored on the test rows: see {folder}")
    measure = choose_measure(first.result, outcomes)
    order = rank_methods(comparison, leaderboard)
    methods = [
        build_method_result(
            label,
            trials[label],
            seeds[label],
            [trial for trial in tuning.trials.values() if trial.method == label] if tuning is not None else [],
            outcomes.get(label),
            measure,
            errors=[
                _explain_missing(trial, scored) for trial in trials[label] if trial.id not in _list_ids(seeds[label])
            ],
            cost=costs.get(label),
            served_by=_find_servers(folder, seeds[label]),
            validation=_average_validation(trials[label], leaderboard),
        )
        for label in [*order, *(label for label in trials if label not in order)]
    ]
    tests = compare_pairs(outcomes, {label: [each.seed for each in found] for label, found in seeds.items()}, measure)
    own = first.result.metric
    best = own.best if measure == "metric" and own is not None else "min" if measure == "loss" else "max"
    result = CompareResult(
        status="done",
        name=comparison.name,
        folder=str(get_comparison_folder(comparison)),
        metric=comparison.metric,
        measure=measure,
        best=best,
        num_rows=first.result.num_rows,
        methods=add_orders(methods, tests, best),
        bases=_build_bases(folder, seeds),
        tests=tests,
        notes=tuple(notes),
        registry=trained.registry,
    )
    return result.model_copy(update={"verdict": write_verdict(result)})


def _list_scored(trials: Sequence[TrialState], scored: Mapping[str, ScoredTrial]) -> list[ScoredSeed]:
    found = []
    for trial in trials:
        mine = scored.get(trial.id)
        if mine is not None and mine.scorecard is not None:
            found.append(ScoredSeed(trial, mine, mine.scorecard))
    return found


def _list_ids(seeds: Sequence[ScoredSeed]) -> set[str]:
    return {each.trial.id for each in seeds}


def _average_validation(trials: Sequence[TrialState], leaderboard: Leaderboard) -> float | None:
    search = leaderboard.study.search
    values = [best.get_value(search.key) for trial in trials if (best := trial.find_best(search)) is not None]
    return sum(values) / len(values) if values else None


def _explain_missing(trial: TrialState, scored: Mapping[str, ScoredTrial]) -> str:
    """Return why a trial has no scorecard."""
    error = scored[trial.id].error if trial.id in scored else None
    return f"seed {trial.config.seed}: {trial.error or error or 'it was not scored'}"


def _find_servers(folder: Path, seeds: Sequence[ScoredSeed]) -> list[str]:
    if not seeds:
        return []
    trial = seeds[0].trial
    return find_servers(folder / ADAPTERS / trial.id, trial.config.quantization.type)


def _build_bases(folder: Path, seeds: Mapping[str, Sequence[ScoredSeed]]) -> tuple[MethodResult, ...]:
    """Return the row of each untuned base that the methods were trained on, the plain one first."""
    found: dict[str, MethodResult] = {}
    for each in (each for mine in seeds.values() for each in mine):
        quantization, file = each.trial.config.quantization.type, get_base_rows_file(folder, each.trial.config)
        if each.scorecard.base is not None and quantization not in found and file.is_file():
            name = "base" if quantization == "none" else f"base, {quantization}"
            found[quantization] = build_base_result(name, each.scorecard.base, Outcomes.read([file]))
    return tuple(found[key] for key in sorted(found, key=lambda key: (key != "none", key)))
