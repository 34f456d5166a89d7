"""The retry policy: a request begins again when its replica is lost, as long as the client has received nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rankloom.engine.jobs import ReplicaLostError

ATTEMPTS = 4
"""Attempts at one request, the first one included."""
FIRST_PAUSE_S = 0.1
"""Pause before the second attempt; it doubles before each further one."""


class Retries:
    """The attempts of one request, counted over all replicas that it loses."""

    def __init__(self, on_retry: Callable[[], None]) -> None:
        self.attempt = 0
        """The number of the current attempt, from 0."""
        self._on_retry = on_retry

    async def pause(self, error: ReplicaLostError) -> None:
        """Wait until the next attempt may begin. Raises `error` where none is left."""
        if self.attempt + 1 == ATTEMPTS:
            raise error
        self._on_retry()
        await asyncio.sleep(FIRST_PAUSE_S * 2**self.attempt)
        self.attempt += 1
