"""Channel: the small actor between a trial's workers and its driver.

Events flow to the driver and the request to stop flows to the workers. An error that a restart would repeat is kept
here, so that a restarted group of workers finds it and does nothing.
"""

from __future__ import annotations

from collections.abc import Collection

from rankloom.events import Event
from rankloom.launch.failures import Failure


class Channel:
    """The channel of one trial. Every method is short, so a plain (not asyncio) actor is enough."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stop = False
        self._failure: Failure | None = None
        self._left: set[int] = set()

    def push(self, events: list[Event]) -> bool:
        """Take a worker's events; return whether the driver asked to stop."""
        self._events += events
        return self._stop

    def take(self, stop: bool) -> list[Event]:
        """Return the events since the last call; `stop` asks the workers to stop."""
        self._stop = self._stop or stop
        events, self._events = self._events, []
        return events

    def join(self, rank: int) -> bool:
        """Register a worker that starts; return False if the trial has already failed and the worker must not run."""
        if self._failure is None:
            self._left.discard(rank)
        else:
            self._left.add(rank)
        return self._failure is None

    def leave(self, rank: int) -> None:
        """Register that a worker is done."""
        self._left.add(rank)

    def fail(self, rank: int, failure: Failure) -> None:
        """Register a worker's failure that a restart would repeat; the first failure is kept."""
        self._failure = self._failure or failure
        self._left.add(rank)

    def all_left(self, ranks: Collection[int]) -> bool:
        return self._left.issuperset(ranks)

    def failure(self) -> Failure | None:
        return self._failure
