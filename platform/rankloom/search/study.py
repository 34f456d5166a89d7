"""`run`: a whole study, from its config to the winner in the registry.

    decide    whether the study starts, goes on or is finished, before Ray does anything
    search    Ray Tune asks the searcher for points and the scheduler who goes on; trials are members of hosts
    journal   the driver writes down each report, keeps the board and tells the caller (`journal.py`, `board.py`)
    finish    the best by validation are scored on the test rows and published (`finish.py`); results.parquet

The study's folder, `<output.root>/studies/<name>`, holds study.yaml, journal.jsonl, adapters/<trial> (each trial's
best), dedicated/<trial> (runs that can't share a base), tune/ (Ray Tune's own state), and at the end results.parquet
and result.json.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from rankloom.config import StudyConfig, dump, parse
from rankloom.config.base import read_yaml
from rankloom.config.study import PbtConfig, is_fusable
from rankloom.errors import ConfigError, RankloomError, TrialError
from rankloom.launch import cluster
from rankloom.launch.hosts import Hosts, groups, share_out
from rankloom.launch.run_folder import absolute, changes, hold
from rankloom.launch.trainer import failure_of
from rankloom.search.board import Board, write_results
from rankloom.search.finish import finish
from rankloom.search.journal import Event, Journal, StopWhenFatal

STUDY, JOURNAL, RESULT, RESULTS, TUNE = "study.yaml", "journal.jsonl", "result.json", "results.parquet", "tune"
MAY_CHANGE = ("hosts.run_ahead", "hosts.token_budget", "hosts.checkpoint_every_s", "hosts.lease_s", "final.")
"""Settings (by prefix) that `--resume` takes from the new config; all else is part of what Ray Tune goes on with."""
TRIAL_CPUS = 0.001
"""A trial only waits for its host."""
SAVE_EVERY_S = "3"
"""Between two savings of Ray Tune's state: what a killed driver forgets."""

Tell = Callable[[Event], None]
Decision = Literal["start", "resume", "finished"]


def run(
    study: StudyConfig, *, resume: bool = False, on_event: Tell = lambda _: None, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Search, score the best on the test rows, publish.

    Args:
        resume: continue the study of this name; a finished one is not run again.
        on_event: called in this thread: the journal's lines, `phase`, and `status` about once a second.
        stop: once set, the study stops where it can be resumed; the result's status is "interrupted".

    Returns:
        status (done or interrupted), name, study (its folder), winner, finalists, counts, occupancy and the like.

    Raises:
        RankloomError: ConfigError before anything starts; else what failed, for the user to read.
    """
    study = resolved(study)
    folder = study_folder(study)
    decide(study, folder, resume=resume)  # what is refused leaves no trace, not even a lock
    with hold(folder, "study"):
        try:
            return _run(study, folder, on_event, stop or threading.Event(), resume=resume)
        except OSError as error:
            raise TrialError(f"output.root: {folder} can't be used: {error}; make room, --resume goes on") from None


def _run(study: StudyConfig, folder: Path, on_event: Tell, stop: threading.Event, *, resume: bool) -> dict[str, Any]:
    decision = decide(study, folder, resume=resume)
    if decision == "finished":
        finished: dict[str, Any] = json.loads((folder / RESULT).read_text())
        return finished
    _check(study)
    if decision == "start":  # what a study left that never trained
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / STUDY, yaml.safe_dump(dump(study), sort_keys=False))
    on_event({"event": "phase", "phase": "launch", "message": "connecting to Ray"})
    with cluster.connected(study.baseline.compute.model_copy(update={"num_workers": 1})), _hosts(study) as hosts:
        journal = _search(study, folder, hosts, on_event, stop)
        board = journal.board
        if journal.fatal is not None:
            raise TrialError(journal.fatal)
        write_results(board, folder / RESULTS)
        outcome = {
            "name": study.name,
            "study": str(folder),
            "results": str(folder / RESULTS),
            "counts": board.counts(),
            "num_refused": board.num_refused,
            "tokens": board.tokens,
            "hosts": list(journal.host_stats.values()),
        }
        if journal.interrupted:
            return {"status": "interrupted"} | outcome
        if not board.finalists():
            reasons = sorted({trial.error or "without a report" for trial in board.trials.values()})
            raise TrialError(f"every trial of study {study.name!r} failed: {reasons[0] if reasons else 'none began'}")
        try:
            outcome |= finish(study, folder, journal, hosts, on_event)
        except KeyboardInterrupt:  # Ray Tune, which takes Ctrl-C for as long as it runs, is done
            return {"status": "interrupted"} | outcome
    _replace(folder / RESULT, json.dumps({"status": "done"} | outcome, indent=2) + "\n")
    return {"status": "done"} | outcome


def _replace(path: Path, text: str) -> None:
    staged = path.with_suffix(".staged")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


def study_folder(study: StudyConfig) -> Path:
    root = study.baseline.output.root
    if "://" in root:
        raise ConfigError(f"trial.output.root={root}: a study needs a folder that all its nodes share, no URL")
    return Path(root) / "studies" / study.name


def decide(study: StudyConfig, folder: Path, *, resume: bool) -> Decision:
    """Whether to start this study here, to go on with it, or nothing (it is finished).

    Raises:
        ConfigError: the folder holds another study, or none where one was to be resumed.
    """
    if not (folder / STUDY).is_file():
        if resume:
            raise ConfigError(f"--resume: no study {study.name!r} at {folder}; leave --resume out to start it")
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} exists and holds no study of rankloom's; choose another name")
        return "start"
    begun = (folder / JOURNAL).is_file() and '"event": "report"' in (folder / JOURNAL).read_text(encoding="utf-8")
    if not resume and begun:
        raise ConfigError(
            f"study {study.name!r} exists at {folder}; --resume continues it, or choose another name (name=...)"
        )
    if not begun:  # nothing was trained: the data or the base could not be loaded
        return "start"
    saved = dump(parse(StudyConfig, read_yaml(folder / STUDY), str(folder / STUDY)))
    differing = {key: line for key, line in changes(saved, dump(study)).items() if not key.startswith(MAY_CHANGE)}
    if differing:
        raise ConfigError(
            f"--resume of {study.name!r}: these settings differ from the study's (saved -> given): "
            f"{'; '.join(differing.values())}; restore them, or start another study with name=..."
        )
    return "finished" if (folder / RESULT).is_file() else "resume"


def resolved(study: StudyConfig) -> StudyConfig:
    """The study with its local paths absolute: hosts run in folders of their own."""
    tree = dump(study)
    tree["trial"] = _absolute(
        tree["trial"] | {"output": {"root": study.baseline.output.root} | tree["trial"].get("output", {})}
    )
    tree["space"] = [_absolute(branch) for branch in tree["space"]]
    tree["search"]["warm_start"] = [_absolute(fragment) for fragment in tree["search"]["warm_start"]]
    return parse(StudyConfig, tree)


def _absolute(fragment: dict[str, Any]) -> dict[str, Any]:
    """A fragment of a trial with its files' paths absolute."""

    def source(value: Any) -> Any:
        if isinstance(value, str):
            return absolute(value)
        return value | {"path": absolute(value["path"])} if isinstance(value, dict) and "path" in value else value

    result = dict(fragment)
    for section, keys in (("data", ("train", "validation", "test")), ("eval", ("retention",))):
        if isinstance(result.get(section), dict):
            result[section] = {k: source(v) if k in keys else v for k, v in result[section].items()}
    if isinstance(result.get("model"), dict) and isinstance(result["model"].get("id"), str):
        result["model"] = result["model"] | {"id": absolute(result["model"]["id"])}
    if isinstance(result.get("output"), dict) and "root" in result["output"]:
        result["output"] = result["output"] | {"root": absolute(result["output"]["root"], must_exist=False)}
    return result


def _check(study: StudyConfig) -> None:
    """What needs Ray Tune to be known, and is still known before anything starts."""
    from rankloom.search.schedulers import build_scheduler
    from rankloom.search.searchers import StudySearcher

    build_scheduler(study)
    StudySearcher(study)
    if isinstance(study.scheduler, PbtConfig):
        for trial in study.members():
            if not is_fusable(trial):
                raise ConfigError(
                    f"scheduler.type=pbt copies weights between members of hosts, which method.type="
                    f"{trial.method.type} as it is set here can't be; use lora or dora, or another scheduler"
                )


@contextmanager
def _hosts(study: StudyConfig) -> Iterator[Any]:
    """The actor that opens and shares out the study's hosts, which end with it."""
    import ray

    hosts = ray.remote(Hosts).options(max_concurrency=1000, **cluster.beside_me()).remote(dump(study), cluster.alive())
    try:
        yield hosts
    finally:
        ray.get(hosts.close.remote())
        ray.kill(hosts)


def _search(study: StudyConfig, folder: Path, hosts: Any, tell: Tell, stop: threading.Event) -> Journal:
    """Run Ray Tune until the study is searched, stopped or hopeless."""
    import ray

    opened = ray.get(hosts.prepare.remote())
    if opened:
        tell({"event": "phase", "phase": "launch", "message": f"{len(opened)} host(s) are loading their base"})
    for noisy in ("ray.tune", "ray.train"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # their advice would tear the study's own display
    journal = Journal(Board.read(study, folder / JOURNAL), folder / JOURNAL, tell, hosts, stop)
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        from rankloom.search.stage import on_stage

        # a trial that can't be fused drives a Ray Train run, which wants a process of its own
        with on_stage() if all(map(is_fusable, study.members())) else nullcontext():
            _tuner(study, folder, hosts, journal).fit()
        journal.reconcile()
        journal.take_stats(ray.get(hosts.stats.remote()))
        journal.tell_status()
    except RankloomError:
        raise
    except Exception as error:
        raise failure_of(error).error from None
    finally:
        with suppress(ValueError):  # not in the main thread, where Ray Tune leaves its own handler
            signal.signal(signal.SIGINT, on_interrupt)
        journal.close()
    return journal


def _tuner(study: StudyConfig, folder: Path, hosts: Any, journal: Journal) -> Any:
    from ray import tune

    from rankloom.search.schedulers import build_scheduler
    from rankloom.search.searchers import StudySearcher, population
    from rankloom.search.trainable import StudyTrial

    plan = share_out(study, cluster.alive())
    slots = max(1, plan.hosts_per_group * len(groups(study)) * study.hosts.num_slots)
    waiting = study.hosts.num_waiting if study.hosts.num_waiting is not None else -(-slots // 2)
    concurrent = min(study.num_trials, slots + waiting)
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the journal is what is read
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = SAVE_EVERY_S
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(concurrent)  # else trials start one after another
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    trainable = tune.with_resources(
        tune.with_parameters(
            StudyTrial, study=dump(study), hosts=hosts, folder=str(folder), dedicated_cpus=plan.dedicated_cpus
        ),
        {"cpu": TRIAL_CPUS},
    )
    stopper = StopWhenFatal(journal)
    if tune.Tuner.can_restore(str(folder / TUNE)):
        tuner = tune.Tuner.restore(str(folder / TUNE), trainable, resume_errored=True)
        # what was pickled with the study knew the last driver's terminal and files
        run_config = tuner._local_tuner.get_run_config()
        run_config.callbacks, run_config.stop = [journal], stopper
        return tuner
    is_population = isinstance(study.scheduler, PbtConfig)
    return tune.Tuner(
        trainable,
        param_space=population(study) if is_population else None,
        tune_config=tune.TuneConfig(
            metric=study.search.metric,
            mode=study.search.best,
            search_alg=None if is_population else StudySearcher(study),
            scheduler=build_scheduler(study),
            num_samples=1 if is_population else study.num_trials,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(folder),
            stop=stopper,
            callbacks=[journal],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=study.hosts.max_failures),
            # an exploit may come late to the checkpoint that it copies
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4 if is_population else 2, checkpoint_at_end=False),
        ),
    )
