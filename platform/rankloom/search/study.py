"""`tune`: run a study, from its config to the winner in the registry.

    decide    whether the study starts, resumes or is finished, before Ray does anything
    search    Ray Tune gets points from the searcher and the scheduler's decisions; trials are members of hosts
              (`tuning.py`)
    journal   the driver writes each report, updates the leaderboard and calls the caller (`journal.py`,
              `leaderboard.py`)
    publish   the best by validation are scored on the test rows and published (`publish_best.py`); results.parquet

The study's folder, `<output.root>/studies/<name>`, holds study.yaml, known.json (the searcher's priors),
journal.jsonl, tensorboard/, origins/ (fingerprints of its data and bases), adapters/<trial> (each trial's best),
dedicated/<trial> (runs that can't share a base), tune/ (Ray Tune's own state), and at the end results.parquet,
optuna.log (the trials for optuna-dashboard) and result.json.
"""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from rankloom.config import StudyConfig, coerce, dump, parse
from rankloom.config.base import read_yaml
from rankloom.config.metric import HANDED_OVER
from rankloom.config.paths import resolve_paths
from rankloom.config.study import is_fusable
from rankloom.errors import ConfigError, TrialError
from rankloom.evals.own_metric import MetricFunction
from rankloom.events import Event, OnEvent, PhaseStarted, WarningRaised
from rankloom.launch import cluster, tracking
from rankloom.launch.handed_over import keep_metric, use_study_metric, use_study_rows
from rankloom.launch.run_folder import ID, find_changes, lock_folder
from rankloom.registry import Registry
from rankloom.search.curves import track_study
from rankloom.search.journal import Journal
from rankloom.search.leaderboard import Leaderboard, write_results
from rankloom.search.optuna_storage import write_optuna
from rankloom.search.own_search import OwnSearch
from rankloom.search.priors import Priors
from rankloom.search.publish_best import StudyEnd, finish
from rankloom.search.results import StudyResult
from rankloom.search.study_files import JOURNAL, KNOWN, OPTUNA, RESULT, RESULTS, STUDY
from rankloom.search.tuning import run_hosts, search
from rankloom.training.resume_check import find_study_warning

MAY_CHANGE = (
    "trial.tracking.", "hosts.num_slots", "hosts.run_ahead", "hosts.token_budget", "hosts.checkpoint_every_s",
    "hosts.lease_s", "final.", "trial.compute.price_per_hour",
)  # fmt: skip
"""Settings (by prefix) that `--resume` takes from the new config; Ray Tune's saved state depends on the rest."""

NOTHING_HANDED_OVER = OwnSearch()
Decision = Literal["start", "resume", "finished"]
End = Callable[[StudyConfig, Path, Journal, Any, OnEvent], StudyEnd | None]
"""Ends a study: gets it with its folder, its journal, the actor of its hosts and the function that takes events."""


def tune(
    study: StudyConfig | str | Path | Mapping[str, Any],
    *,
    resume: bool = False,
    on_event: OnEvent = lambda _: None,
    stop: threading.Event | None = None,
    metric: MetricFunction | None = None,
    data: Any = None,
    searcher: Any = None,
    sampler: Any = None,
    scheduler: Any = None,
) -> StudyResult:
    """Search for the best trial: many train at once on one shared base; the best are scored and published.

    The best by validation are scored on the test rows. The winner is published under the study's name, each method's
    best under its own. It runs on the Ray cluster that `RAY_ADDRESS` names, else on a local Ray that it starts.

    Args:
        study: What to search: a `StudyConfig`, a dict of the same settings, or the path of a YAML file with them
            (`shipped:studies/quickstart.yaml` comes with rankloom).
        metric: A function of predictions in place of `search.metric` (see `rankloom.evals.own_metric`); a resumed
            study needs it again.
        data: Rows in place of `data.train`: a `datasets.Dataset`, a pandas DataFrame or a list of dicts; or a mapping
            from train, validation and test to these. They are written to `<output.root>/data`.
        searcher: A Ray Tune `Searcher` object in place of `search.algorithm`. It sees all branches' knobs at once. A
            resumed study needs it again, and so the next two.
        sampler: An Optuna sampler in place of `search.algorithm`.
        scheduler: A Ray Tune `TrialScheduler` object in place of `scheduler`; reports have the budget's `percent`.
        resume: Resume the study of this name. A finished study is not repeated: its result is returned.
        on_event: Called in this thread with every event: reports and ends of trials, phases, warnings, and the
            study's status about once a second.
        stop: Set it, from another thread, to stop the study where `resume` continues it.

    Returns:
        The study's result: `winner`, `front` (the Pareto front), `trials` (a DataFrame of all), `adapter` and more.
        Its `status` is "interrupted" if it was stopped.

    Raises:
        ConfigError: A setting is wrong, or a study of this name exists; nothing was started.
        DataError: The data is missing or malformed.
        ModelError: The base can't be found or loaded.
        TrialError: Every trial failed, or would fail, as on a full disk.

    Examples:
        >>> import rankloom as rl
        >>> study = rl.StudyConfig(
        ...     name="ticket-search",
        ...     trial={"model": "Qwen/Qwen3-0.6B", "data": {"train": "tickets.csv"}},
        ...     space=[{"method": {"type": "lora", "rank": {"choice": [4, 8, 16]}}}],
        ...     search={"num_trials": 3},
        ... )
        >>> result = rl.tune(study)
        >>> result.adapter
        'ticket-search@1'
        >>> len(result.trials)
        3
    """
    own = OwnSearch(searcher, sampler, scheduler)
    study = own.name_in(use_study_rows(use_study_metric(coerce(StudyConfig, study), metric), data))
    return run_study(study, resume=resume, on_event=on_event, stop=stop, own=own, metric=metric)


def run_study(
    study: StudyConfig,
    *,
    resume: bool,
    on_event: OnEvent,
    stop: threading.Event | None = None,
    own: OwnSearch = NOTHING_HANDED_OVER,
    metric: MetricFunction | None = None,
    end: End = finish,
    vetted: bool = False,
) -> StudyResult:
    """Run a study as `tune` does, for it and for a comparison.

    Args:
        end: What to do with the trials when the search is done; what it returns is a part of the result, if it does.
        vetted: Whether its trials were checked, as a comparison does it for all of its studies.
    """
    study = resolve_study_paths(study)
    folder = get_study_folder(study)
    decision = decide_study(study, folder, resume=resume)  # a refusal leaves no trace, not even a lock
    if decision != "finished" and not vetted:
        from rankloom.planning.gate import vet_trials

        searched = {name for knobs in study.knobs for name in knobs}
        vet_trials(study.probe_trials(), study.name, on_event, metric, fused=True, searched=searched)
    with lock_folder(folder, "study"):
        try:
            return _run(study, folder, on_event, stop or threading.Event(), own, end, resume=resume, metric=metric)
        except OSError as error:
            raise TrialError(f"output.root: {folder} can't be used: {error}; make room; --resume continues") from None


def _run(
    study: StudyConfig,
    folder: Path,
    on_event: OnEvent,
    stop: threading.Event,
    own: OwnSearch,
    end: End,
    *,
    resume: bool,
    metric: MetricFunction | None,
) -> StudyResult:
    decision = decide_study(study, folder, resume=resume)
    if decision == "finished":
        return StudyResult.model_validate_json((folder / RESULT).read_text())
    priors = Priors.read(folder / KNOWN) if decision == "resume" else Priors.gather(study)
    _check(study, priors, own)
    if decision == "start":  # files of a study that never trained
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / STUDY, yaml.safe_dump(dump(study), sort_keys=False))
    priors.write(folder / KNOWN)
    if metric is not None and study.search.is_handed_over:
        keep_metric(folder, metric)
    if study.search.priors:
        on_event(PhaseStarted("priors", _describe_priors(priors)))
    if changed := find_study_warning(folder):
        on_event(WarningRaised(changed))
    leaderboard = Leaderboard.read(study, folder / JOURNAL)
    with track_study(study, _read_id(folder), leaderboard, folder) as track:

        def tell(event: Event) -> None:
            track(event)
            on_event(event)

        result = _search(study, priors, leaderboard, folder, tell, stop, own, end)
        if result.status == "done":
            _replace(folder / RESULT, json.dumps(result.to_dict(), indent=2) + "\n")
            tell(result.to_event())
        return result


def _search(
    study: StudyConfig,
    priors: Priors,
    leaderboard: Leaderboard,
    folder: Path,
    tell: OnEvent,
    stop: threading.Event,
    own: OwnSearch,
    end: End,
) -> StudyResult:
    cluster.announce(tell)
    with (
        cluster.connect(study.baseline.compute.model_copy(update={"num_workers": 1})),
        run_hosts(study, folder) as hosts,
    ):
        journal = search(study, priors.points, leaderboard, folder, hosts, tell, stop, own)
        write_results(leaderboard, folder / RESULTS)
        write_optuna(leaderboard, folder / JOURNAL, folder / OPTUNA)
        result = StudyResult(
            status="interrupted",
            name=study.name,
            folder=str(folder),
            results=str(folder / RESULTS),
            counts=leaderboard.count_by_status(),
            num_refused=leaderboard.num_refused,
            priors=priors.counts,
            tokens=leaderboard.tokens,
            hosts=tuple(journal.host_stats.values()),
        )
        if journal.interrupted:
            return result
        if not leaderboard.choose_finalists():
            reasons = sorted({trial.error or "without a report" for trial in leaderboard.trials.values()})
            raise TrialError(f"every trial of study {study.name!r} failed: {reasons[0] if reasons else 'none began'}")
        try:
            ended = end(study, folder, journal, hosts, tell)
        except KeyboardInterrupt:  # Ray Tune, which handles Ctrl-C while it runs, is done
            return result
        return result.model_copy(update={"status": "done"} | (vars(ended) if ended is not None else {}))


def _read_id(folder: Path) -> str:
    """Return the study's unique id; a later study of the same name has another."""
    path = folder / ID
    if not path.is_file():
        _replace(path, uuid.uuid4().hex)
    return path.read_text()


def _replace(path: Path, text: str) -> None:
    staged = path.with_suffix(".staged")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


def get_study_folder(study: StudyConfig) -> Path:
    root = study.baseline.output.root
    if "://" in root:
        raise ConfigError(
            f"trial.output.root={root}: a study needs a folder that all its nodes share, not a URL; give one, and "
            f"publish to the URL with trial.output.registry={root.rstrip('/')}/registry"
        )
    return Path(root) / "studies" / study.name


def decide_study(study: StudyConfig, folder: Path, *, resume: bool) -> Decision:
    """Return whether to start this study here, to resume it, or that it is finished.

    Raises:
        ConfigError: the folder holds another study, or there is no study to resume.
    """
    if not (folder / STUDY).is_file():
        if resume:
            raise ConfigError(f"--resume: no study {study.name!r} at {folder}; omit --resume to start it")
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} exists and does not hold a rankloom study; choose another name")
        return "start"
    begun = has_begun(folder)
    if not resume and begun:
        raise ConfigError(
            f"study {study.name!r} exists at {folder}; --resume continues it, or choose another name (name=...)"
        )
    if not begun:  # nothing trained: the data or the base could not be loaded
        return "start"
    saved = dump(parse(StudyConfig, read_yaml(folder / STUDY), str(folder / STUDY)))
    differing = {key: line for key, line in find_changes(saved, dump(study)).items() if not key.startswith(MAY_CHANGE)}
    if differing:
        raise ConfigError(
            f"--resume of {study.name!r}: these settings differ from the study's (saved -> given): "
            f"{'; '.join(differing.values())}; restore them{_explain_given_again(saved)}, or start another study with "
            f"name=..."
        )
    return "finished" if (folder / RESULT).is_file() else "resume"


def has_begun(folder: Path) -> bool:
    """Return whether a trial of the study in this folder has reported."""
    return (folder / JOURNAL).is_file() and '"event": "report"' in (folder / JOURNAL).read_text(encoding="utf-8")


def _explain_given_again(saved: dict[str, Any]) -> str:
    """Return a hint about the objects that the study began with."""
    own = "own" in (saved["search"]["algorithm"], saved["scheduler"]["type"])
    handed = own or saved["search"]["metric"].startswith(HANDED_OVER)
    return ", and hand the searcher, sampler, scheduler or metric over again" if handed else ""


def resolve_study_paths(study: StudyConfig) -> StudyConfig:
    """Return the study with absolute local paths, including the default of `trial.output.root`."""
    root = {"root": study.baseline.output.root}
    trial = study.trial | {"output": root | study.trial.get("output", {})}
    return resolve_paths(study.model_copy(update={"trial": trial}))


def _describe_priors(priors: Priors) -> str:
    skipped = "".join(f"; {count} left out: {reason}" for reason, count in priors.skipped.items())
    return f"the searcher knows {len(priors.priors)} earlier trials{skipped}"


def _check(study: StudyConfig, priors: Priors, own: OwnSearch) -> None:
    """Check what only Ray Tune can tell, before anything starts."""
    from rankloom.search.schedulers import build_scheduler
    from rankloom.search.tune_searcher import StudySearcher

    for trial in study.probe_trials():
        tracking.check(trial)
        Registry(trial.output.registry_root)
    build_scheduler(study, own)
    StudySearcher(study, priors.points, own)
    if study.is_population:
        for trial in study.probe_trials():
            if not is_fusable(trial):
                raise ConfigError(
                    f"scheduler.type={study.scheduler.type} copies weights between members of hosts, which method.type="
                    f"{trial.method.type} as it is set here can't be; use lora or dora, or another scheduler"
                )
