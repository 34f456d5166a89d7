"""A request under way: from its first tokens to its end, which is told to the gateway exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from rankloom.engine.jobs import CompletionJob, JobProgress, ReplicaLostError
from rankloom.gateway.keys import Key
from rankloom.gateway.metrics import Traffic
from rankloom.gateway.policy import Decision, RoutingRequest, Target

ATTEMPTS = 4
"""How often a request is begun when replicas are lost under it."""


class InFlightRequest:
    """A request under way: read it to its end, or close it."""

    def __init__(
        self,
        run: Callable[[CompletionJob], AsyncIterator[JobProgress]],
        ended: Callable[[InFlightRequest, BaseException | None], None],
        lost: Callable[[], None],
        work: CompletionJob,
        target: Target,
        decision: Decision,
        ask: RoutingRequest,
        key: Key | None,
        deadline: float,
        traffic: Traffic = "live",
    ) -> None:
        """
        Args:
            run: does the work, on some replica.
            ended: is told of the end, with the error that it ended with, or CancelledError; with none, there is
                something to `drain`.
            lost: is told each time that a replica was lost and the work is begun again.
            deadline: of `time.monotonic`.
        """
        self.work = work
        self.target = target
        self.decision = decision
        self.ask = ask
        self.key = key
        self.traffic = traffic
        self.begun_at = time.monotonic()
        self.first_at: float | None = None
        self.prompt_tokens = self.cached_tokens = self.tokens = 0
        self._run, self._ended, self._lost = run, ended, lost
        self._stream: AsyncIterator[JobProgress] | None = None
        self._deadline = deadline
        self._unfinished = len(work.prompts) * work.n
        """Completions. With the last one all is said: the stream's own end comes later, and nobody waits for it."""
        self._over = False
        self._first: JobProgress | None = None

    async def open(self) -> None:
        """Wait for the first tokens; begin again where a replica is lost meanwhile."""
        try:
            for attempt in range(ATTEMPTS):
                self._stream = self._run(replace(self.work, id=f"{self.work.id}-{attempt}"))
                try:
                    self._first = await self._next()
                    return
                except ReplicaLostError:
                    if attempt + 1 == ATTEMPTS:
                        raise
                    self._lost()
                    await asyncio.sleep(0.1 * 2**attempt)
        except BaseException as error:
            await self._end(error)
            raise

    async def __aiter__(self) -> AsyncIterator[JobProgress]:
        try:
            if self._first is not None:
                yield self._first
            while self._unfinished and (progress := await self._next()) is not None:
                yield progress
        except BaseException as error:
            await self._end(error)
            raise
        await self._end(None)

    async def drain(self) -> None:
        """Wait for the stream's own end, which says no more than that all completions have ended."""
        assert self._stream is not None
        with contextlib.suppress(Exception):
            async for _ in self._stream:
                pass

    async def aclose(self) -> None:
        """End it, if it has not ended: nobody reads it any more."""
        await self._end(asyncio.CancelledError())

    async def _next(self) -> JobProgress | None:
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._deadline - time.monotonic()):
                assert self._stream is not None
                progress = await anext(self._stream)
        except StopAsyncIteration:
            return None
        self.first_at = self.first_at or time.monotonic()
        self.prompt_tokens = progress.prompt_tokens
        for index, delta in progress.deltas:
            self.tokens += len(delta.tokens)
            self._unfinished -= delta.finish is not None
            if index == 0:
                self.cached_tokens = delta.cached_tokens
        return progress

    async def _end(self, error: BaseException | None) -> None:
        if self._over:
            return
        self._over = True
        if error is None:
            asyncio.get_running_loop().call_soon(self._ended, self, None)  # the client first
            return
        self._ended(self, error)
        close: Callable[[], Any] | None = getattr(self._stream, "aclose", None)
        if close is not None:
            with contextlib.suppress(Exception):
                await close()
