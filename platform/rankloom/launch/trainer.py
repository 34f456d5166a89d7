"""`fit`: run a trial, in this process or on Ray Train's workers, and bring back its result.

    decide    whether the run starts, goes on or is finished (`run_folder.py`), before Ray does
    launch    `rankloom.train.run.run_trial` with a Session: LocalSession here, RayTrainSession in a Ray Train worker
    watch     the driver takes events off the `Channel` and hands them to the trackers and the caller
    unwrap    whatever failed reaches the caller as one RankloomError

Ray restarts the workers when one dies. An error that a restart would repeat is returned by the workers as data,
so that it is not retried.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rankloom.config import TrialConfig, dump, parse
from rankloom.errors import ConfigError, RankloomError, TrialError
from rankloom.launch import cluster, tracking
from rankloom.launch.channel import Channel, Failure
from rankloom.launch.run_folder import ERROR, RESULT, RunFolder, resolved
from rankloom.registry import Registry

Event = dict[str, Any]
Tell = Callable[[Event], None]

TAKE_EVERY_S = 0.2
PUSH_EVERY_S = 0.2
LEAVE_TOGETHER_S = 10.0
"""How long a worker that failed waits for the others to end too, before it makes Ray end them."""
CHECKPOINT = "checkpoint-{step:08d}-{nonce}"


def train_trial(
    trial: TrialConfig,
    *,
    resume: bool = False,
    train: bool = True,
    on_event: Tell = lambda _: None,
    stop: threading.Event | None = None,
    study: Path | None = None,
) -> dict[str, Any]:
    """Train, export, score and publish one trial.

    Args:
        resume: continue the run of this name; a finished one is not run again.
        train: False, with `resume`: a run that was stopped ends here, with the best checkpoint that it has.
        on_event: called in this thread with every event of rank 0 (see `rankloom.train.session`).
        stop: once set, the loop saves a checkpoint and the result's status is "interrupted".
        study: as in `run_trial`.

    Returns:
        `run_trial`'s result, with `run` (the run's folder).

    Raises:
        RankloomError: ConfigError before anything starts; else what failed, for the user to read.
    """
    trial = resolved(trial)
    if trial.compute.num_workers == 0 and "://" in trial.output.root:
        raise ConfigError(
            f"output.root={trial.output.root}: compute.num_workers=0 keeps checkpoints on a local disk; give a folder, "
            f"or set compute.num_workers=1"
        )
    tracking.check(trial)
    Registry(trial.output.registry_root)  # a wrong URL is found before the training
    run = RunFolder(trial)
    if run.decide(trial, resume=resume) != "finished" and study is None:  # what is refused leaves no trace, nor a lock
        from rankloom.train.preflight import preflight

        preflight([trial])
    with run.held():
        return _fit(trial, run, on_event, stop or threading.Event(), resume=resume, train=train, study=study)


def _fit(
    trial: TrialConfig,
    run: RunFolder,
    on_event: Tell,
    stop: threading.Event,
    *,
    resume: bool,
    train: bool,
    study: Path | None,
) -> dict[str, Any]:
    if run.decide(trial, resume=resume) == "finished":
        return run.result()
    run.begin(trial)
    try:
        with tracking.tracked(trial, run) as track:

            def tell(event: Event) -> None:
                track(event)
                on_event(event)

            launch = _in_this_process if trial.compute.num_workers == 0 else _on_ray
            outcome = launch(trial, run, tell, stop, train, study)
            outcome["run"] = run.path
            if outcome["status"] == "done":
                run.write(RESULT, json.dumps(outcome, indent=2) + "\n")
            tell({"event": "done", **outcome})
            return outcome
    except RankloomError:
        run.abandon()
        raise


def _in_this_process(
    trial: TrialConfig, run: RunFolder, tell: Tell, stop: threading.Event, train: bool, study: Path | None
) -> dict[str, Any]:
    try:
        import torch

        from rankloom.train.run import run_trial
        from rankloom.train.session import LocalSession

        if trial.compute.cpus_per_worker:
            torch.set_num_threads(trial.compute.cpus_per_worker)
        assert run.local is not None
        session = LocalSession(run.local, device=local_device(trial.compute.device), on_event=tell, stop=stop)
        return run_trial(trial, session, train=train, study=study)
    except Exception as error:
        _raise(failure_of(error), run)


def local_device(wanted: str) -> Any:
    """This process's torch device."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device=cuda: torch finds no CUDA device here; set compute.device=cpu, or auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _on_ray(
    trial: TrialConfig, run: RunFolder, tell: Tell, stop: threading.Event, train: bool, study: Path | None
) -> dict[str, Any]:
    cluster.announce(tell)
    with cluster.connected(trial.compute) as share:
        import ray
        from ray.train import TrainingFailedError

        kind = "core(s) and a GPU" if share.gpu else "core(s)"
        message = f"starting {share.num_workers} worker(s) with {share.cpus} {kind} each"
        tell({"event": "phase", "phase": "launch", "message": message})
        channel = ray.remote(Channel).options(**cluster.beside_me()).remote()
        fitting = Background(lambda: _ray_trainer(trial, run, share, channel, train, study).fit())
        watch(fitting, channel, tell, stop)
        failure: Failure | None = ray.get(channel.failure.remote())
        if failure is not None:
            _raise(failure, run)
        try:
            outcome: dict[str, Any] = fitting.result().return_value
        except TrainingFailedError as error:
            _raise(_training_failed(error, trial), run)
        except Exception as error:
            _raise(failure_of(error), run)
        return outcome


def _ray_trainer(
    trial: TrialConfig, run: RunFolder, share: cluster.WorkerResources, channel: Any, train: bool, study: Path | None
) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    tree, cpus = dump(trial), share.cpus

    def each_worker() -> dict[str, Any] | None:
        return work(tree, channel, cpus, train, study)

    return TorchTrainer(
        each_worker,
        scaling_config=ScalingConfig(
            num_workers=share.num_workers, use_gpu=share.gpu, resources_per_worker=share.resources
        ),
        run_config=RunConfig(
            name=trial.name,
            storage_path=run.parent,
            failure_config=FailureConfig(max_failures=trial.compute.max_failures),
            # Ray keeps the latest besides the one with the highest score
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="score"),
            worker_runtime_env={"env_vars": cluster.worker_environment(cpus, gpu=share.gpu)},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def work(tree: dict[str, Any], channel: Any, cpus: int, train: bool, study: Path | None) -> dict[str, Any] | None:
    """What every Ray Train worker runs; rank 0 returns the result, None after an error that the channel holds."""
    import ray
    import ray.train
    import torch

    from rankloom.train.run import run_trial

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if not ray.get(channel.join.remote(rank)):
        return None
    torch.set_num_threads(cpus)
    try:
        with RayTrainSession.opened(rank, world_size, channel) as session:
            outcome = run_trial(parse(TrialConfig, tree), session, train=train, study=study)
        ray.get(channel.leave.remote(rank))
        return outcome
    except Exception as error:
        failure = failure_of(error)
        if failure.trace is not None and world_size > 1:
            raise  # perhaps only since another worker died: let Ray restart them all
        ray.get(channel.fail.remote(rank, failure))
        others, deadline = set(range(world_size)) - {rank}, time.monotonic() + LEAVE_TOGETHER_S
        while not ray.get(channel.all_left.remote(others)):
            if time.monotonic() > deadline:
                raise  # the others wait for this worker in a collective: Ray ends them, the next attempt does nothing
            time.sleep(TAKE_EVERY_S)
        return None


class RayTrainSession:
    """A Session (see `rankloom.train.session`) of a Ray Train worker."""

    def __init__(self, rank: int, world_size: int, channel: Any) -> None:
        from ray.train.torch import get_device

        self.rank = rank
        self.world_size = world_size
        self.device = get_device()
        self._channel = channel
        self._outbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stop = False

    @classmethod
    @contextmanager
    def opened(cls, rank: int, world_size: int, channel: Any) -> Iterator[RayTrainSession]:
        """A session whose rank 0 talks to the channel from a thread of its own, for training must not wait for it."""
        session, ended = cls(rank, world_size, channel), threading.Event()

        def talk() -> None:
            while not ended.wait(PUSH_EVERY_S):
                session._push()

        thread = threading.Thread(target=talk, name="rankloom-events", daemon=True)
        if rank == 0:
            thread.start()
        try:
            yield session
        finally:
            ended.set()
            if rank == 0:
                thread.join()
                session._push()

    def emit(self, event: Event) -> None:
        if self.rank == 0:
            self._outbox.put(event)

    def should_stop(self) -> bool:
        """Rank 0's answer is everyone's: the loop adds the workers' up."""
        return self._stop

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        import ray.train

        with _opened(ray.train.get_checkpoint()) as folder:
            yield folder

    @contextmanager
    def best_checkpoint(self) -> Iterator[Path | None]:
        import ray.train

        reported = ray.train.get_all_reported_checkpoints()  # waits for those under way
        best = max(reported, key=lambda r: float(r.metrics["score"]), default=None)
        with _opened(best and best.checkpoint) as folder:
            yield folder

    def save_checkpoint(self, folder: Path | None, metrics: dict[str, float]) -> None:
        import ray.train

        # of equal scores the earlier is better, as in LocalSession; Ray would take the later
        ranked = metrics | {"score": metrics["score"] - 1e-12 * metrics["step"]}
        if folder is None:
            ray.train.report(ranked)
            return
        # a step that is repeated after a restart must not be written over the folder that Ray's snapshot names
        name = CHECKPOINT.format(step=int(metrics["step"]), nonce=time.time_ns())
        try:
            ray.train.report(ranked, checkpoint=ray.train.Checkpoint(folder), checkpoint_dir_name=name)
        except OSError as error:
            raise TrialError(f"could not write {name}: {error}; earlier checkpoints are intact") from None

    def _push(self) -> None:
        import ray

        events = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._outbox.get_nowait())
        with contextlib.suppress(ray.exceptions.RayError):  # nobody listens any more: no reason to end the training
            self._stop = ray.get(self._channel.push.remote(events))


@contextmanager
def _opened(checkpoint: Any) -> Iterator[Path | None]:
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


class Background:
    """A call in a thread that does not keep the process alive; in the main thread Ray Train would take SIGINT over."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._value = call()
            except BaseException as error:  # handed to `result`'s caller
                self._error = error

        self._thread = threading.Thread(target=run, name="rankloom-fit", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait a while; True once it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


def watch(call: Background, channel: Any, tell: Tell, stop: threading.Event | None = None) -> None:
    """Hand on the channel's events until the call has ended."""
    import ray

    ended = False
    while not ended:
        ended = call.join(TAKE_EVERY_S)
        for event in ray.get(channel.take.remote(stop is not None and stop.is_set())):
            tell(event)


def failure_of(error: Exception) -> Failure:
    """An exception as something that survives pickling and that a user can read."""
    if isinstance(error, RankloomError):
        return Failure(error, None)
    if type(error).__name__ == "OutOfMemoryError":  # torch's and Ray's; neither need be imported here
        advice = "lower optim.batch_size or raise optim.accumulation, set compute.activation_checkpointing, or quantise"
        return Failure(TrialError(f"out of memory: {_line(error)}; {advice}"), None)
    return Failure(TrialError(f"failed: {type(error).__name__}: {_line(error)}"), traceback.format_exc())


def _training_failed(error: Any, trial: TrialConfig) -> Failure:
    """Ray Train's error: the first worker's reason, unless that is only that a neighbour went away."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    causes = [getattr(failures[rank], "_base_exc", failures[rank]) for rank in sorted(failures)]
    died = [cause for cause in causes if type(cause).__module__.startswith("ray.")]
    known = [cause for cause in causes if isinstance(cause, RankloomError)]
    if known:
        return Failure(known[0], None)
    cause = (died or causes or [getattr(error, "controller_failure", error)])[0]
    text = f"failed: {type(cause).__name__}: {_line(cause)}"
    if died:
        text = f"a worker died, and compute.max_failures={trial.compute.max_failures} restart(s) are used up: {text}"
    return Failure(TrialError(f"{text}; --resume goes on from the last checkpoint"), str(error))


def _raise(failure: Failure, run: RunFolder) -> NoReturn:
    """Raise the failure; its trace, if it has one, goes to the run's log."""
    if failure.trace is None:
        raise failure.error from None
    where = run.write(ERROR, failure.trace)
    raise TrialError(f"{failure.error}; the whole trace is in {where}") from None


def _line(error: BaseException) -> str:
    text = str(error)
    if "Traceback (most recent call last)" in text:  # Ray Tune's errors hold that of their cause: its last line says it
        text = text.strip().splitlines()[-1]
    text = " ".join(text.split())
    return text if len(text) <= 400 else f"{text[:400]} ..."
