"""A trial in a Ray Train worker: each worker runs `run_on_worker`, and its loop uses `RayTrainSession`."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankloom.config import TrialConfig
from rankloom.errors import TrialError
from rankloom.events import Event
from rankloom.launch.failures import to_failure

if TYPE_CHECKING:
    from rankloom.launch.trainer import Work
    from rankloom.training.run import TrialOutcome

PUSH_EVERY_S = 0.2
ASK_EVERY_S = 0.2
LEAVE_TOGETHER_S = 10.0
"""Seconds that a failed worker waits for the others to end, before it makes Ray end them."""
CHECKPOINT = "checkpoint-{step:08d}-{nonce}"


def run_on_worker(trial: TrialConfig, channel: Any, cpus: int, work: Work) -> TrialOutcome | None:
    """Run a trial on a Ray Train worker; rank 0 returns the result, or None after an error, which the channel holds.

    Args:
        work: `run_trial`'s further arguments.
    """
    import ray
    import ray.train
    import torch

    from rankloom.training.run import run_trial

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if not ray.get(channel.join.remote(rank)):
        return None
    torch.set_num_threads(cpus)
    try:
        with RayTrainSession.connect(rank, world_size, channel) as session:
            outcome = run_trial(trial, session, **work)
        ray.get(channel.leave.remote(rank))
        return outcome
    except Exception as error:
        failure = to_failure(error)
        if failure.trace is not None and world_size > 1:
            raise  # another worker's death may be the cause: let Ray restart them all
        ray.get(channel.fail.remote(rank, failure))
        others, deadline = set(range(world_size)) - {rank}, time.monotonic() + LEAVE_TOGETHER_S
        while not ray.get(channel.all_left.remote(others)):
            if time.monotonic() > deadline:
                raise  # the others wait for this worker in a collective: Ray ends them, the next attempt does nothing
            time.sleep(ASK_EVERY_S)
        return None


class RayTrainSession:
    """A Session (see `rankloom.training.session`) of a Ray Train worker."""

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
    def connect(cls, rank: int, world_size: int, channel: Any) -> Iterator[RayTrainSession]:
        """Yield a session; rank 0 talks to the channel in its own thread, so that training does not wait for it."""
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
        """Return whether to stop. Only rank 0 knows; the loop sums the workers' answers."""
        return self._stop

    @contextmanager
    def open_latest_checkpoint(self) -> Iterator[Path | None]:
        import ray.train

        with _open_checkpoint(ray.train.get_checkpoint()) as folder:
            yield folder

    @contextmanager
    def open_best_checkpoint(self) -> Iterator[Path | None]:
        import ray.train

        reported = ray.train.get_all_reported_checkpoints()  # waits for reports in progress
        best = max(reported, key=lambda r: float(r.metrics["score"]), default=None)
        with _open_checkpoint(best and best.checkpoint) as folder:
            yield folder

    def save_checkpoint(self, folder: Path | None, metrics: dict[str, float]) -> None:
        import ray.train

        # the earlier of equal scores is better, as in LocalSession; Ray would take the later
        ranked = metrics | {"score": metrics["score"] - 1e-12 * metrics["step"]}
        if folder is None:
            ray.train.report(ranked)
            return
        # a step repeated after a restart must not overwrite the folder that Ray's snapshot names
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
        with contextlib.suppress(ray.exceptions.RayError):  # the driver's channel is gone; training continues
            self._stop = ray.get(self._channel.push.remote(events))


@contextmanager
def _open_checkpoint(checkpoint: Any) -> Iterator[Path | None]:
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)
