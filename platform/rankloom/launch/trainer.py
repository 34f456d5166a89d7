"""`train`: run a trial, in this process or on Ray Train's workers, and bring back its result.

    decide    whether the run starts, resumes or is finished (`run_folder.py`), before Ray does
    launch    `rankloom.training.run.run_trial` with a Session: LocalSession here, `ray_session.py` in a Ray worker
    watch     the driver takes events from the `Channel` and passes them to the trackers and the caller
    unwrap    every failure reaches the caller as one RankloomError (`failures.py`)

Ray restarts the workers when one dies. Workers return an error that a restart would repeat as data, so that Ray does
not retry it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from rankloom.config import TrialConfig, coerce
from rankloom.config.paths import resolve_paths
from rankloom.errors import ConfigError, RankloomError, TrialError
from rankloom.evals.own_metric import MetricFunction
from rankloom.events import Event, OnEvent, PhaseStarted, RunFinished
from rankloom.launch import cluster, tracking
from rankloom.launch.background import Background, watch
from rankloom.launch.channel import Channel
from rankloom.launch.failures import Failure, to_failure, to_training_failure
from rankloom.launch.handed_over import use_trial_metric, use_trial_rows
from rankloom.launch.orphans import remove_orphaned_groups
from rankloom.launch.results import TrialResult
from rankloom.launch.run_folder import ERROR, RESULT, RunFolder
from rankloom.registry import Registry

if TYPE_CHECKING:
    from rankloom.training.run import TrialOutcome


class Work(TypedDict):
    """The arguments of `run_trial` beside the trial."""

    train: bool
    study: Path | None
    metric: MetricFunction | None


def train(
    trial: TrialConfig | str | Path | Mapping[str, Any],
    *,
    metric: MetricFunction | None = None,
    data: Any = None,
    resume: bool = False,
    on_event: OnEvent = lambda _: None,
    stop: threading.Event | None = None,
) -> TrialResult:
    """Train one trial, score it beside its base on the test rows, and publish the adapter.

    It runs on the Ray cluster that `RAY_ADDRESS` names, else on a local Ray that it starts; with
    `compute.num_workers=0` it runs in this process.

    Args:
        trial: what to train: a `TrialConfig`, a dict of the same settings, or the path of a YAML file with them
            (`shipped:trials/lora.yaml` comes with rankloom).
        metric: A function of predictions in place of `eval.metric` (see `rankloom.evals.own_metric`); a resumed run
            needs it again.
        data: Rows in place of `data.train`: a `datasets.Dataset`, a pandas DataFrame or a list of dicts; or a mapping
            from train, validation and test to these. They are written to `<output.root>/data`.
        resume: Resume the run of this name. A finished run is not repeated: its result is returned.
        on_event: Called in this thread with every event: data, steps, evaluations, phases, warnings.
        stop: Set it, from another thread, to stop after the current step with a checkpoint that `resume` continues.

    Returns:
        The trial's result: `adapter`, `scorecard`, `run` and more. Its `status` is "interrupted" if it was stopped.

    Raises:
        ConfigError: A setting is wrong, or a run of this name exists; nothing was started.
        DataError: The data is missing or malformed.
        ModelError: The base can't be found or loaded.
        TrialError: The training failed; `resume` continues from the last checkpoint.

    Examples:
        >>> import rankloom as rl
        >>> trial = rl.TrialConfig(
        ...     name="tickets",
        ...     model="Qwen/Qwen3-0.6B",
        ...     data={"train": "tickets.csv"},
        ...     method=rl.LoraConfig(rank=16),
        ... )
        >>> result = rl.train(trial)
        >>> result.adapter
        'tickets@1'
        >>> result.scorecard.result.loss < result.scorecard.base.loss
        True
    """
    return train_trial(
        use_trial_rows(coerce(TrialConfig, trial), data), metric=metric, resume=resume, on_event=on_event, stop=stop
    )


def train_trial(
    trial: TrialConfig,
    *,
    resume: bool = False,
    train: bool = True,
    on_event: OnEvent = lambda _: None,
    stop: threading.Event | None = None,
    study: Path | None = None,
    metric: MetricFunction | None = None,
) -> TrialResult:
    """Train a trial as `train` does, alone or for a study.

    Args:
        train: False, with `resume`, ends a stopped run with its best checkpoint, without more training.
        study: The folder of the run's study; the run's data and base must match it.
    """
    trial = resolve_paths(use_trial_metric(trial, metric))
    if trial.compute.num_workers == 0 and "://" in trial.output.root:
        raise ConfigError(
            f"output.root={trial.output.root}: compute.num_workers=0 keeps checkpoints on a local disk; give a folder, "
            f"or set compute.num_workers=1"
        )
    tracking.check(trial)
    Registry(trial.output.registry_root)  # find a wrong URL before the training
    run = RunFolder(trial)
    if run.decide_run(trial, resume=resume) != "finished" and study is None:  # a refusal leaves no trace
        from rankloom.planning.gate import vet_trials

        vet_trials([trial], trial.name, on_event, metric)
    with run.lock():
        work = Work(train=train, study=study, metric=metric)
        return _fit(trial, run, work, on_event, stop or threading.Event(), resume=resume)


def _fit(
    trial: TrialConfig,
    run: RunFolder,
    work: Work,
    on_event: OnEvent,
    stop: threading.Event,
    *,
    resume: bool,
) -> TrialResult:
    if run.decide_run(trial, resume=resume) == "finished":
        return run.read_result()
    run.begin(trial)
    try:
        with tracking.track_run(trial, run) as track:

            def tell(event: Event) -> None:
                track(event)
                on_event(event)

            launch = _run_here if trial.compute.num_workers == 0 else _on_ray
            outcome = launch(trial, run, work, tell, stop)
            result = TrialResult.model_validate({**outcome, "run": run.path})
            if result.status == "done":
                run.write(RESULT, json.dumps(result.to_dict(), indent=2) + "\n")
            tell(RunFinished(**result.to_dict()))
            return result
    except RankloomError:
        run.abandon()
        raise


def _run_here(trial: TrialConfig, run: RunFolder, work: Work, tell: OnEvent, stop: threading.Event) -> TrialOutcome:
    try:
        import torch

        from rankloom.models.device import choose_device
        from rankloom.training.run import run_trial
        from rankloom.training.session import LocalSession

        if trial.compute.cpus_per_worker:
            torch.set_num_threads(trial.compute.cpus_per_worker)
        assert run.local is not None
        session = LocalSession(run.local, device=choose_device(trial.compute.device), on_event=tell, stop=stop)
        outcome = run_trial(trial, session, **work)
        assert outcome is not None  # of rank 0
        return outcome
    except Exception as error:
        _raise(to_failure(error), run)


def _on_ray(trial: TrialConfig, run: RunFolder, work: Work, tell: OnEvent, stop: threading.Event) -> TrialOutcome:
    cluster.announce(tell)
    with cluster.connect(trial.compute) as share:
        import ray
        from ray.train import TrainingFailedError

        kind = "core(s) and a GPU" if share.gpu else "core(s)"
        message = f"starting {share.num_workers} worker(s) with {share.cpus} {kind} each"
        tell(PhaseStarted("launch", message))
        # a report with a checkpoint waits until Ray looks at the workers again, by default for up to two seconds
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
        remove_orphaned_groups()  # of an earlier attempt, whose process was killed
        channel = ray.remote(Channel).options(**cluster.pin_to_this_node()).remote()
        fitting = Background(lambda: _build_ray_trainer(trial, run, work, share, channel).fit())
        watch(fitting, channel, tell, stop)
        failure: Failure | None = ray.get(channel.failure.remote())
        if failure is not None:
            _raise(failure, run)
        try:
            outcome: TrialOutcome = fitting.result().return_value
        except TrainingFailedError as error:
            _raise(to_training_failure(error, trial), run)
        except Exception as error:
            _raise(to_failure(error), run)
        return outcome


def _build_ray_trainer(
    trial: TrialConfig, run: RunFolder, work: Work, share: cluster.WorkerResources, channel: Any
) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from rankloom.launch.ray_session import run_on_worker

    cpus = share.cpus

    def each_worker() -> TrialOutcome | None:
        return run_on_worker(trial, channel, cpus, work)

    return TorchTrainer(
        each_worker,
        scaling_config=ScalingConfig(
            num_workers=share.num_workers, use_gpu=share.gpu, resources_per_worker=share.reserved
        ),
        run_config=RunConfig(
            name=trial.name,
            storage_path=run.parent,
            failure_config=FailureConfig(max_failures=trial.compute.max_failures),
            # Ray keeps the latest beside the one with the highest score
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="score"),
            worker_runtime_env={"env_vars": cluster.make_worker_environment(cpus, gpu=share.gpu)},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _raise(failure: Failure, run: RunFolder) -> NoReturn:
    """Raise the failure; write its trace, if it has one, to the run's error.log."""
    if failure.trace is None:
        raise failure.error from None
    where = run.write(ERROR, failure.trace)
    raise TrialError(f"{failure.error}; the full trace is in {where}") from None
