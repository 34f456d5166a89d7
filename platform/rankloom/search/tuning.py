"""Run Ray Tune: the searcher gives points, the scheduler decides which trials continue, hosts train them.

It uses `tune.run`, not `tune.Tuner`: a restored Tuner keeps its pickled callbacks, which hold the last driver's
terminal and files, and has no public way to replace them. `tune.run` takes new ones each time, and continues from the
state in the study's folder.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rankloom.config import StudyConfig
from rankloom.config.study import HyperBandConfig, OwnSchedulerConfig, PbtConfig, is_fusable
from rankloom.errors import RankloomError, TrialError
from rankloom.events import OnEvent, PhaseStarted
from rankloom.hosts.hosts import Hosts, group_trials, share_out
from rankloom.launch import cluster
from rankloom.launch.failures import to_failure
from rankloom.launch.run_folder import ERROR
from rankloom.search.journal import Journal, find_full_disk
from rankloom.search.leaderboard import Leaderboard
from rankloom.search.own_search import OwnSearch
from rankloom.search.samplers import PriorTrial
from rankloom.search.study_files import JOURNAL, TUNE

TRIAL_CPUS = 0.001
"""Cores reserved for a trial, which only waits for its host."""
SAVE_EVERY_S = "3"
"""Seconds between two saves of Ray Tune's state; a killed driver loses at most this much."""


@contextmanager
def run_hosts(study: StudyConfig, folder: Path) -> Iterator[Any]:
    """Yield the actor that starts and assigns the study's hosts, which end with it; `folder` is the study's."""
    import ray

    options = {"max_concurrency": 1000} | cluster.pin_to_this_node()
    hosts = ray.remote(Hosts).options(**options).remote(study, cluster.list_alive_nodes(), folder)
    try:
        yield hosts
    finally:
        ray.get(hosts.close.remote())
        ray.kill(hosts)


def search(
    study: StudyConfig,
    priors: Sequence[PriorTrial],
    leaderboard: Leaderboard,
    folder: Path,
    hosts: Any,
    tell: OnEvent,
    stop: threading.Event,
    own: OwnSearch,
) -> Journal:
    """Run Ray Tune until the search is done or stopped.

    Args:
        leaderboard: the trials in the study's journal so far.
        own: objects that were handed over.

    Raises:
        RankloomError: an error that would fail every trial.
    """
    import ray

    opening = hosts.prepare.remote()
    from rankloom.search.shared_actor import share_one_actor  # imports Ray Tune while the hosts start

    if opened := ray.get(opening):
        tell(PhaseStarted("launch", f"{len(opened)} host(s) are loading their base"))
    for noisy in ("ray.tune", "ray.train"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # their output would break the study's display
    journal = Journal(leaderboard, folder / JOURNAL, tell, hosts, stop)
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        # a trial that can't be fused drives a Ray Train run, which needs its own process
        with share_one_actor() if all(map(is_fusable, study.probe_trials())) else nullcontext():
            _tune(study, priors, folder, hosts, journal, own)
        if journal.fatal is not None:
            raise TrialError(journal.fatal)
        journal.reconcile()
        journal.take_stats(ray.get(hosts.get_stats.remote()))
        journal.tell_status()
    except RankloomError:
        raise
    except Exception as error:
        if (problem := find_full_disk(folder)) is not None:
            raise problem from None
        (folder / ERROR).write_text(f"{error}\n{traceback.format_exc()}", encoding="utf-8")
        raise TrialError(f"{to_failure(error).error}; the full trace is in {folder / ERROR}") from None
    finally:
        with suppress(ValueError):  # outside the main thread, which keeps its handler
            signal.signal(signal.SIGINT, on_interrupt)
        journal.close()
    return journal


def _tune(
    study: StudyConfig, priors: Sequence[PriorTrial], folder: Path, hosts: Any, journal: Journal, own: OwnSearch
) -> None:
    from ray import tune

    from rankloom.search.saved_state import alias_moved_module, check_trials, mend_state
    from rankloom.search.schedulers import build_scheduler
    from rankloom.search.trainable import StudyTrial
    from rankloom.search.tune_searcher import StudySearcher, draw_population

    plan = share_out(study, cluster.list_alive_nodes())
    concurrent = count_live(study, plan.hosts_per_group, plan.num_slots)
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the journal replaces them
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = SAVE_EVERY_S
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(concurrent)  # else trials start one after another
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    trainable = tune.with_parameters(
        StudyTrial, study=study, hosts=hosts, folder=str(folder), dedicated_cpus=plan.dedicated_cpus
    )
    is_population = study.is_population
    searcher = None if is_population else StudySearcher(study, priors, own)
    alias_moved_module()
    try:
        mend_state(folder / TUNE)
        check_trials(folder / TUNE)
        if searcher is not None and any((folder / TUNE).glob("searcher-state-*")):
            StudySearcher(study, priors, own).restore_from_dir(str(folder / TUNE))
    except Exception as error:  # Ray Tune would log it, and begin again or wait for ever
        raise TrialError(
            f"{folder / TUNE}: the state of the search can't be read: {type(error).__name__}: {error}; install the "
            f"version of rankloom that wrote it, or start a new study with name=..."
        ) from error
    tune.run(
        tune.with_resources(trainable, {"cpu": TRIAL_CPUS}),
        name=TUNE,
        storage_path=str(folder),
        resume="AUTO+ERRORED",
        metric=study.search.key,
        mode=study.search.best,
        config=draw_population(study, priors) if is_population else None,
        search_alg=searcher,
        num_samples=1 if is_population else study.num_trials,
        scheduler=build_scheduler(study, own),
        max_concurrent_trials=concurrent,
        reuse_actors=True,
        trial_name_creator=_id_of,
        trial_dirname_creator=_id_of,
        callbacks=[journal],
        max_failures=study.hosts.max_failures,
        raise_on_failed_trial=False,
        # an exploit may copy a checkpoint late
        checkpoint_config=tune.CheckpointConfig(num_to_keep=4 if is_population else 2, checkpoint_at_end=False),
        verbose=0,
    )


def count_live(study: StudyConfig, hosts_per_group: int, num_slots: int) -> int:
    """Return the number of trials that Ray Tune runs at once: those with a slot, and those that wait for one."""
    slots = max(1, hosts_per_group * len(group_trials(study)) * num_slots)
    if study.hosts.num_waiting is not None:
        waiting = study.hosts.num_waiting
    elif not all(map(is_fusable, study.probe_trials())):  # each trial is then one process or more
        waiting = -(-slots // 2)
    elif isinstance(study.scheduler, (HyperBandConfig, PbtConfig, OwnSchedulerConfig)):
        waiting = study.num_trials
    else:
        waiting = slots if study.search.learns else 2 * slots
    return min(study.num_trials, slots + waiting)


def _id_of(trial: Any) -> str:
    # Ray Tune saves this function's name with each trial: a study can't be resumed under another
    return str(trial.trial_id)
