"""Channel: the small actor between a trial's workers and its driver.

Events flow to the driver, the wish to stop flows to the workers, and an error that no restart would cure is kept
here, so that a restarted group of workers learns of it and does nothing.
"""

from __future__ import annotations

from collections.abc import Collection

from rankloom.events import Event
from rankloom.launch.failures import Failure


class Channel:
    """One trial's. Every method is short, so a plain (not asyncio) actor will do."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stop = False
        self._failure: Failure | None = None
        self._left: set[int] = set()

    def push(self, events: list[Event]) -> bool:
        """A worker's events; returns whether the driver asked to stop."""
        self._events += events
        return self._stop

    def take(self, stop: bool) -> list[Event]:
        """The events since the last call; `stop` asks the workers to."""
        self._stop = self._stop or stop
        events, self._events = self._events, []
        return events

    def join(self, rank: int) -> bool:
        """A worker starts; False if the trial has failed already, and it need not."""
        if self._failure is None:
            self._left.discard(rank)
        else:
            self._left.add(rank)
        return self._failure is None

    def leave(self, rank: int) -> None:
        """A worker is done."""
        self._left.add(rank)

    def fail(self, rank: int, failure: Failure) -> None:
        """A worker failed in a way that a restart would repeat; the first one's reason is kept."""
        self._failure = self._failure or failure
        self._left.add(rank)

    def all_left(self, ranks: Collection[int]) -> bool:
        return self._left.issuperset(ranks)

    def failure(self) -> Failure | None:
        return self._failure
