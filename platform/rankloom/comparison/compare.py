"""`compare`: run a comparison, from its config to the table.

    check     every trial is resolved; its data and its model's outline are read; nothing has started
    rates     with `tune`: a study of each method's learning rates
    train     a study of each method with each seed; all trials are scored on the test rows, the best are published
    costs     each method trains alone for a few steps, for its memory and its speed
    compare   intervals, paired tests and the verdict (`analysis.py`), and the files

The comparison's folder, `<output.root>/comparisons/<name>`, holds compare.yaml, studies/ (the studies' own folders),
costs.json, and at the end result.json and the files of `export.py`. A study that is done is not repeated on `--resume`,
nor is a method's cost that was measured.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from rankloom.comparison.analysis import build_result
from rankloom.comparison.export import export
from rankloom.comparison.results import CompareResult
from rankloom.comparison.studies import (
    COMPARE,
    RESULT,
    build_rates_study,
    build_seeds_study,
    choose_names_of_best,
    choose_rates,
    get_comparison_folder,
)
from rankloom.config import StudyConfig, TrialConfig, coerce, dump, parse
from rankloom.config.base import read_yaml
from rankloom.config.compare import CompareConfig
from rankloom.config.metric import name_function
from rankloom.config.paths import resolve_path, resolve_paths
from rankloom.config.space import merge
from rankloom.errors import ConfigError, RankloomError, TrialError
from rankloom.evals.own_metric import MetricFunction
from rankloom.events import OnEvent, PhaseStarted, WarningRaised
from rankloom.launch import cluster
from rankloom.launch.handed_over import write_rows
from rankloom.launch.method_cost import measure_cost_remotely
from rankloom.launch.run_folder import find_changes, lock_folder
from rankloom.registry.scorecard import MethodCost
from rankloom.search.leaderboard import Leaderboard
from rankloom.search.publish_best import finish
from rankloom.search.results import StudyResult
from rankloom.search.study import get_study_folder, has_begun, run_study
from rankloom.search.study_files import JOURNAL

COSTS = "costs.json"
MAY_CHANGE = (
    "trial.tracking.", "hosts.run_ahead", "hosts.token_budget", "hosts.checkpoint_every_s", "hosts.lease_s",
    "trial.compute.price_per_hour",
)  # fmt: skip
"""Settings (by prefix) that `--resume` takes from the new config."""


def compare(
    comparison: CompareConfig | str | Path | Mapping[str, Any],
    *,
    resume: bool = False,
    on_event: OnEvent = lambda _: None,
    stop: threading.Event | None = None,
    metric: MetricFunction | None = None,
    data: Any = None,
) -> CompareResult:
    """Compare methods on one task: train each with several seeds under one budget, and say which differences are real.

    All methods train on the same rows and are scored on the same test rows. It runs on the Ray cluster that
    `RAY_ADDRESS` names, else on a local Ray that it starts.

    Args:
        comparison: What to compare: a `CompareConfig`, a dict of the same settings, or the path of a YAML file with
            them (`shipped:compare/quick.yaml` comes with rankloom).
        resume: Resume the comparison of this name. A finished one is not repeated: its result is returned.
        on_event: Called in this thread with every event.
        stop: Set it, from another thread, to stop where `resume` continues.
        metric: A function of predictions in place of `metric` (see `rankloom.evals.own_metric`); a resumed comparison
            needs it again. The methods are tested by it if it gives a number for each row.
        data: Rows in place of `trial.data.train`, as `rankloom.tune` takes them.

    Returns:
        The result: `methods` (a row for each), `tests`, `verdict`, `winner`, `table` (a DataFrame) and more.

    Raises:
        ConfigError: A setting is wrong, or a comparison of this name exists; nothing was started.
        DataError: The data is missing or malformed.
        ModelError: The base can't be found or loaded.
        TrialError: Every trial failed, or would fail, as on a full disk.

    Examples:
        >>> import rankloom as rl
        >>> comparison = rl.CompareConfig(
        ...     name="ticket-methods",
        ...     trial={"model": "Qwen/Qwen3-0.6B", "data": {"train": "tickets.csv"}, "budget": {"steps": 60}},
        ...     methods=["lora", "qlora", "dora"],
        ... )
        >>> result = rl.compare(comparison)
        >>> [method.name for method in result.methods if method.seeds]
        ['dora', 'lora', 'qlora']
        >>> result.winner is None  # where the best two are not told apart
        True
    """
    comparison = _use_python(coerce(CompareConfig, comparison), metric, data)
    folder = get_comparison_folder(comparison)
    if not _is_finished(comparison, folder, resume=resume):
        from rankloom.planning.gate import vet_trials

        vet_trials(_list_trials(comparison), comparison.name, on_event, metric, fused=True)
    with lock_folder(folder, "comparison"):
        if _is_finished(comparison, folder, resume=resume):
            return CompareResult.model_validate_json((folder / RESULT).read_bytes())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / COMPARE).write_text(yaml.safe_dump(dump(comparison), sort_keys=False), encoding="utf-8")
            return _run(comparison, folder, on_event, stop or threading.Event(), metric)
        except OSError as error:
            raise TrialError(f"output.root: {folder} can't be used: {error}; make room; --resume continues") from None


def _run(
    comparison: CompareConfig, folder: Path, tell: OnEvent, stop: threading.Event, metric: MetricFunction | None
) -> CompareResult:
    interrupted = CompareResult(status="interrupted", name=comparison.name, folder=str(folder))
    cluster.announce(tell)
    with cluster.attach():
        rates, notes, tuning = {m.label: m.learning_rate for m in comparison.methods}, list[str](), None
        if comparison.tune:
            study = build_rates_study(comparison)
            tell(PhaseStarted("tune", f"{study.num_trials} trials for the methods' learning rates"))
            tried = _train(study, tell, stop, metric, rank_only=True)
            if tried.status == "interrupted":
                return interrupted
            tuning = _read_trials(study, tried)
            rates, notes = choose_rates(comparison, tuning)
        study = build_seeds_study(comparison, rates)
        tell(PhaseStarted("train", f"{len(comparison.methods)} methods with {len(comparison.seeds)} seed(s) each"))
        trained = _train(study, tell, stop, metric, comparison)
        if trained.status == "interrupted":
            return interrupted
        costs = _measure_costs(comparison, rates, folder, tell, stop, metric)
        if costs is None:
            return interrupted
    result = build_result(comparison, trained, _read_trials(study, trained), tuning, costs, notes)
    export(result, folder)
    return result


def _train(
    study: StudyConfig,
    tell: OnEvent,
    stop: threading.Event,
    metric: MetricFunction | None,
    comparison: CompareConfig | None = None,
    *,
    rank_only: bool = False,
) -> StudyResult:
    """Run a study, or continue it where it began."""
    end = finish if comparison is None else partial(finish, naming=partial(choose_names_of_best, comparison))
    return run_study(
        study,
        resume=has_begun(get_study_folder(study)),
        on_event=tell,
        stop=stop,
        metric=metric,
        end=(lambda *_: None) if rank_only else end,
        vetted=True,
    )


def _read_trials(study: StudyConfig, result: StudyResult) -> Leaderboard:
    """Return a finished study's trials, without those that a killed driver began and Ray Tune forgot."""
    leaderboard, known = Leaderboard.read(study, Path(result.folder) / JOURNAL), set(result.trials["trial"])
    leaderboard.trials = {name: trial for name, trial in leaderboard.trials.items() if name in known}
    return leaderboard


def _measure_costs(
    comparison: CompareConfig,
    rates: Mapping[str, float],
    folder: Path,
    tell: OnEvent,
    stop: threading.Event,
    metric: MetricFunction | None,
) -> dict[str, MethodCost] | None:
    """Return each method's cost, measured alone; None if the comparison was stopped. A failure is a warning."""
    path = folder / COSTS
    costs = {name: MethodCost(**each) for name, each in json.loads(path.read_text()).items()} if path.is_file() else {}
    for choice in comparison.methods:
        if stop.is_set():
            return None
        if choice.label in costs:
            continue
        tell(PhaseStarted("cost", f"{choice.label} alone, for its memory and its speed"))
        trial = comparison.resolve(choice, comparison.seeds[0], rates[choice.label])
        try:
            costs[choice.label] = measure_cost_remotely(trial, metric)
        except RankloomError as error:
            tell(WarningRaised(f"{choice.label}: its memory and its speed alone were not measured: {error}"))
            continue
        path.write_text(json.dumps({name: each.model_dump() for name, each in costs.items()}, indent=2) + "\n")
    return costs


def _list_trials(comparison: CompareConfig) -> list[TrialConfig]:
    return [
        comparison.resolve(choice, comparison.seeds[0], rate)
        for choice in comparison.methods
        for rate in comparison.list_rates(choice)
    ]


def _use_python(comparison: CompareConfig, metric: MetricFunction | None, data: Any) -> CompareConfig:
    """Return the comparison with absolute paths, and with the names of what Python code handed over."""
    root = comparison.baseline.output.root
    if "://" in root:
        raise ConfigError(
            f"trial.output.root={root}: a comparison needs a folder that all its nodes share, not a URL; give one, and "
            f"publish to the URL with trial.output.registry={root.rstrip('/')}/registry"
        )
    tree = dump(comparison)
    tree["trial"] = merge(tree["trial"], {"output": {"root": resolve_path(root)}})
    if data is not None:
        rows = {role: {"path": path} for role, path in write_rows(data, root).items()}
        tree["trial"] = merge(tree["trial"], {"data": rows})
    if metric is not None:
        tree["metric"] = name_function(metric)
    return resolve_paths(parse(CompareConfig, tree))


def _is_finished(comparison: CompareConfig, folder: Path, *, resume: bool) -> bool:
    """Return whether the comparison in this folder is finished; False: it may start or continue.

    Raises:
        ConfigError: the folder holds another comparison, or there is none to resume.
    """
    if not (folder / COMPARE).is_file():
        if resume:
            raise ConfigError(f"--resume: no comparison {comparison.name!r} at {folder}; omit --resume to start it")
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} exists and does not hold a rankloom comparison; choose another name")
        return False
    begun = any(map(has_begun, (folder / "studies").glob("*")))
    if not begun:  # nothing was trained: the data or the base could not be loaded
        return False
    if not resume:
        raise ConfigError(
            f"comparison {comparison.name!r} exists at {folder}; --resume continues it, or choose another name "
            f"(name=...)"
        )
    saved = dump(parse(CompareConfig, read_yaml(folder / COMPARE), str(folder / COMPARE)))
    differing = {
        key: line for key, line in find_changes(saved, dump(comparison)).items() if not key.startswith(MAY_CHANGE)
    }
    if differing:
        raise ConfigError(
            f"--resume of {comparison.name!r}: these settings differ from the comparison's (saved -> given): "
            f"{'; '.join(differing.values())}; restore them, or start another comparison with name=..."
        )
    return (folder / RESULT).is_file()
