"""One shared actor, the stage, that holds all fused trials of a study.

Ray Tune gives each trial an actor, and so a process: a second of a core and 120 MB for a trial that only waits for its
host. Here Tune gets, in place of each such actor, a handle with its methods onto one shared actor. A trial is an object
in that, with a thread of its own, so that its calls run one after another as an actor's do.

Tune has no setting for this. `share_one_actor` replaces Tune's actor classes while a study runs. Only this file
relies on Ray's internals, and Ray's version is pinned.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorClass, ActorHandle
from ray.tune.execution import tune_controller

READY, TERMINATE = "__ray_ready__", "__ray_terminate__"
"""Methods that every Ray actor has."""
ENVIRONMENT = {"RAY_CHDIR_TO_TRIAL_DIR": "0"}
"""Trials share the process's one working directory."""


class SharedTrialActor:
    """The shared actor. All its trials die with it, and Tune restarts each from its checkpoint."""

    def __init__(self) -> None:
        self._trials: dict[str, Any] = {}
        self._threads: dict[str, ThreadPoolExecutor] = {}

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]
    async def start(self, key: str, kind: type, arguments: dict[str, Any]) -> None:
        """Create a trial; Ray retries this where the process dies."""
        self._threads[key] = ThreadPoolExecutor(1, thread_name_prefix=key)
        await self._run(key, lambda: self._trials.update({key: kind(**arguments)}))

    async def call(self, key: str, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a method of a trial, after its earlier calls."""
        if method != TERMINATE:
            result = await self._run(key, lambda: getattr(self._trials[key], method)(*arguments, **named))
        if method in (TERMINATE, "stop"):
            self._trials.pop(key, None)
            self._threads.pop(key).shutdown(wait=False)
            return None
        return result

    def _run(self, key: str, work: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._threads[key], work)


@contextmanager
def share_one_actor() -> Iterator[None]:
    """Run Ray Tune's trials in one shared actor during the `with` block."""
    stage = (
        ray.remote(SharedTrialActor)
        .options(num_cpus=0, max_restarts=-1, max_concurrency=10_000, runtime_env={"env_vars": ENVIRONMENT})
        .remote()
    )
    before = tune_controller._ActorClassCache
    tune_controller._ActorClassCache = lambda: _Kinds(stage)
    try:
        yield
    finally:
        tune_controller._ActorClassCache = before
        ray.kill(stage)


class _Kinds:
    """Replaces Tune's cache of actor classes."""

    def __init__(self, stage: Any) -> None:
        self._stage = stage
        self._made: dict[type, _Kind] = {}

    def get(self, trainable: type) -> _Kind:
        if trainable not in self._made:
            self._made[trainable] = _Kind(self._stage, ray.put(trainable))
        return self._made[trainable]


class _Kind(ActorClass):  # type: ignore[misc]
    """Replaces an actor class: `remote` creates a trial on the stage. Ray checks the type, hence the base class."""

    def __init__(self, stage: Any, kind: Any) -> None:
        self._stage, self._kind = stage, kind

    def options(self, **resources: Any) -> _Kind:
        return self  # a trial's resources are held by its placement group; the stage takes none

    def remote(self, **arguments: Any) -> _OnStage:
        key = uuid.uuid4().hex
        return _OnStage(self._stage, key, self._stage.start.remote(key, self._kind, arguments))


class _OnStage(ActorHandle):  # type: ignore[misc]
    """Replaces an actor's handle: each of a trial's methods has a `remote`. Killing it kills the stage."""

    def __init__(self, stage: Any, key: str, started: Any) -> None:
        """`started`: the reference to its start, which also answers whether it is ready."""
        self._stage, self._key, self._started = stage, key, started

    def __getattr__(self, name: str) -> Any:
        if name == READY:
            return _Answered(self._started)
        return _Method(self._stage, self._key, name)

    @property
    def _ray_actor_id(self) -> Any:
        return self._stage._ray_actor_id

    def __del__(self) -> None:
        """Skip Ray's count of an actor's handles."""

    def __repr__(self) -> str:
        return f"trial {self._key} on stage"


class _Answered:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def remote(self) -> Any:
        return self._answer


class _Method:
    def __init__(self, stage: Any, key: str, name: str) -> None:
        self._stage, self._key, self._name = stage, key, name

    def remote(self, *arguments: Any, **named: Any) -> Any:
        return self._stage.call.remote(self._key, self._name, arguments, named)
