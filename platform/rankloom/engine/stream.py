"""From the engine's thread to the event loop: each request's deltas, a step's all at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

from rankloom.engine.protocol import Delta
from rankloom.errors import RankloomError

TURN_S = 0.1
"""The longest that the engine waits for a turn of the event loop."""


class Mailbox:
    """Collects what a step has for the streams, and wakes the event loop once for all of it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outgoing: list[tuple[asyncio.Queue[Delta | RankloomError], Delta | RankloomError]] = []

    def open(self) -> None:
        """Deliver to the event loop that this runs on."""
        self._loop = asyncio.get_running_loop()

    def put(self, to: asyncio.Queue[Delta | RankloomError], what: Delta | RankloomError) -> None:
        self._outgoing.append((to, what))

    def deliver(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing:
            self._call_soon(_deliver, outgoing)

    def wait_for_turn(self) -> None:
        """Wait until what the event loop has ready now is done: requests that came together are all sent by then."""
        done = threading.Event()
        if self._call_soon(done.set):
            done.wait(TURN_S)

    def _call_soon(self, call: Callable[..., object], *arguments: object) -> bool:
        """Have the event loop call it; whether there is one."""
        if self._loop is None or self._loop.is_closed():
            return False
        self._loop.call_soon_threadsafe(call, *arguments)
        return True


def _deliver(outgoing: list[tuple[asyncio.Queue[Delta | RankloomError], Delta | RankloomError]]) -> None:
    for to, what in outgoing:
        to.put_nowait(what)


class Stream:
    """One request's deltas: the engine puts them in, the event loop iterates. Bounded by the request's `max_tokens`."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._arrived: asyncio.Queue[Delta | RankloomError] = asyncio.Queue()

    def send(self, delta: Delta) -> None:
        self._mailbox.put(self._arrived, delta)

    def fail(self, error: RankloomError) -> None:
        self._mailbox.put(self._arrived, error)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while True:
            arrived = await self._arrived.get()
            if isinstance(arrived, RankloomError):
                raise arrived
            yield arrived
            if arrived.finish is not None:
                return
