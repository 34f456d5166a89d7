"""AdapterCache: the adapters in memory, loaded by a thread of its own, so that a cold one delays only its requests.

`eviction.py` decides what is loaded and what goes; `loading.py` loads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, Protocol, TypeVar

from rankloom.engine.adapter_cache.eviction import EvictionPolicy
from rankloom.engine.adapter_cache.load_backoff import LoadBackoff
from rankloom.engine.jobs import ReplicaLostError
from rankloom.engine.protocol import Resident
from rankloom.errors import AdapterNotFoundError, OverloadedError, RankloomError, RegistryError
from rankloom.models.device import is_lost

logger = logging.getLogger(__name__)


class CachedAdapter(Protocol):
    """An adapter as its engine keeps it."""

    @property
    def num_bytes(self) -> int: ...


H = TypeVar("H", bound=CachedAdapter)
H_co = TypeVar("H_co", bound=CachedAdapter, covariant=True)


class AdapterLoader(Protocol[H_co]):
    """Loads adapters into memory; one thread makes both calls."""

    def load(self, ref: str) -> H_co:
        """Load a version. Raises AdapterNotFoundError, IncompatibleError or RegistryError where it can't be served."""
        ...

    def forget(self, ref: str) -> None:
        """Release what the engine holds of an evicted adapter."""
        ...


class AdapterCache(Generic[H]):
    """Owned by one thread, which makes all calls except `list_resident`."""

    def __init__(
        self,
        capacity: int,
        loader: AdapterLoader[H],
        post: Callable[[Callable[[], None]], None],
        failed: Callable[[str, RankloomError], None],
    ) -> None:
        """
        Args:
            post: thread-safe; schedules a callable on the owner's thread.
            failed: called with each version that can't be loaded, and why.
        """
        self._policy: EvictionPolicy[H] = EvictionPolicy(capacity)
        self._backoff = LoadBackoff()
        self._loader, self._post, self._failed = loader, post, failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rankloom-load")
        self._pins: dict[str, list[Future[None]]] = {}
        self.num_loads = self.num_evictions = self.num_failures = 0

    def get_refusal(self, ref: str) -> RankloomError | None:
        """Return why a version can't be loaded, if that was found a short while ago."""
        return self._backoff.get(ref, time.monotonic())

    def ask(self, ref: str) -> None:
        self._policy.ask(ref)

    def release(self, ref: str) -> None:
        self._policy.release(ref)

    def get(self, ref: str) -> H | None:
        """Return the adapter, if it is there."""
        return self._policy.get(ref)

    def pin(self, ref: str, done: Future[None]) -> None:
        """Load an adapter, unless it is there, and keep it; then resolve `done`."""
        if (error := self.get_refusal(ref)) is not None:
            _resolve(done, error)
        elif not self._policy.pin(ref):
            capacity = self._policy.capacity
            _resolve(done, OverloadedError(f"{ref} can't be pinned: all {capacity} places are; unpin another"))
        elif self.get(ref) is not None:
            _resolve(done, None)
        else:
            self._pins.setdefault(ref, []).append(done)

    def unpin(self, ref: str) -> None:
        self._policy.unpin(ref)

    def list_resident(self) -> tuple[Resident, ...]:
        """List the loaded adapters, the most recently used last. Thread-safe."""
        return tuple(
            Resident(ref, entry.pinned, entry.users, entry.adapter.num_bytes)
            for ref, entry in list(self._policy.entries.items())
            if entry.adapter is not None
        )

    def load_next(self) -> None:
        """Begin to load the adapters that have requests and a place."""
        while (load := self._policy.choose_load()) is not None:
            ref, evicted = load
            if evicted is not None:
                self.num_evictions += 1
                self._thread.submit(self._loader.forget, evicted)
            self._thread.submit(self._loader.load, ref).add_done_callback(partial(self._post_loaded, ref))

    def close(self, error: RankloomError) -> None:
        for done in (done for waiting in self._pins.values() for done in waiting):
            _resolve(done, error)
        self._pins.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _post_loaded(self, ref: str, load: Future[H]) -> None:
        if not load.cancelled():
            self._post(partial(self._finish_load, ref, load))

    def _finish_load(self, ref: str, load: Future[H]) -> None:
        error = load.exception()
        if error is not None and is_lost(error):
            raise error
        pins = self._pins.pop(ref, [])
        if error is None:
            self._policy.mark_loaded(ref, load.result())
            self._backoff.clear(ref)
            self.num_loads += 1
            for done in pins:
                _resolve(done, None)
            return
        if not isinstance(error, RankloomError):
            logger.error("loading %s failed", ref, exc_info=error)
            error = RegistryError(f"{ref}: can't be loaded: {error}")
        self.num_failures += 1
        if not isinstance(error, (AdapterNotFoundError, OverloadedError, ReplicaLostError)):  # it may yet be published
            self._backoff.add(ref, error, time.monotonic())
        self._failed(ref, error)
        self._policy.mark_failed(ref)
        for done in pins:
            _resolve(done, error)


def _resolve(done: Future[None], error: RankloomError | None) -> None:
    if not done.set_running_or_notify_cancel():
        return  # cancelled
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
