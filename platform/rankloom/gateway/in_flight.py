"""A request in flight: from its first tokens to its end, which it reports to the gateway exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rankloom.engine.forward import Job, Progress
from rankloom.engine.jobs import ReplicaLostError
from rankloom.gateway.keys import Key
from rankloom.gateway.metrics import Traffic
from rankloom.gateway.policy import Decision, RoutingRequest, Target
from rankloom.gateway.retries import Retries


@dataclass(kw_only=True, eq=False)
class InFlightRequest:
    """A job on a replica: call `open`, then iterate to the end or call `aclose`."""

    job: Job
    routing: RoutingRequest
    decision: Decision
    target: Target
    """The version that does the job, one of the decision's."""
    key: Key | None
    traffic: Traffic
    deadline: float
    """In seconds of `time.monotonic`."""
    run: Callable[[Job], AsyncIterator[Progress]]
    """Does a job on some replica."""
    retries: Retries
    on_end: Callable[[InFlightRequest, BaseException | None], None]
    """Called once, with the error that ended the request, or CancelledError; without an error, call `drain` then."""

    begun_at: float = field(init=False, default_factory=time.monotonic)
    first_at: float | None = field(init=False, default=None)
    """When its first tokens came."""
    prompt_tokens: int = field(init=False, default=0)
    cached_tokens: int = field(init=False, default=0)
    tokens: int = field(init=False, default=0)
    """Generated so far, over all completions."""
    _stream: AsyncIterator[Progress] | None = field(init=False, default=None)
    _first: Progress | None = field(init=False, default=None)
    _unfinished: int = field(init=False)
    """Completions. The request is over with the last one; no client waits for the end of the stream, which is later."""
    _over: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._unfinished = self.job.num_ends

    async def open(self) -> None:
        """Wait for the first tokens; begin again when a replica is lost meanwhile."""
        try:
            while True:
                self._stream = self.run(replace(self.job, id=f"{self.job.id}-{self.retries.attempt}"))
                try:
                    self._first = await self._read_next()
                    return
                except ReplicaLostError as error:
                    await self.retries.pause(error)
        except BaseException as error:
            await self._end(error)
            raise

    async def __aiter__(self) -> AsyncIterator[Progress]:
        try:
            if self._first is not None:
                yield self._first
            while self._unfinished and (progress := await self._read_next()) is not None:
                yield progress
        except BaseException as error:
            await self._end(error)
            raise
        await self._end(None)

    async def drain(self) -> None:
        """Read the stream to its own end, after all completions have ended."""
        assert self._stream is not None
        with contextlib.suppress(Exception):
            async for _ in self._stream:
                pass

    async def aclose(self) -> None:
        """Cancel the request, unless it has ended."""
        await self._end(asyncio.CancelledError())

    async def _read_next(self) -> Progress | None:
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                assert self._stream is not None
                progress = await anext(self._stream)
        except StopAsyncIteration:
            return None
        if progress.streams:
            self.first_at = self.first_at or time.monotonic()
        self.prompt_tokens = progress.prompt_tokens
        self.tokens += progress.num_tokens
        self._unfinished -= progress.num_ends
        self.cached_tokens = progress.cached_tokens or self.cached_tokens
        return progress

    async def _end(self, error: BaseException | None) -> None:
        if self._over:
            return
        self._over = True
        if error is None:
            asyncio.get_running_loop().call_soon(self.on_end, self, None)  # the client first
            return
        self.on_end(self, error)
        close: Callable[[], Any] | None = getattr(self._stream, "aclose", None)
        if close is not None:
            with contextlib.suppress(Exception):
                await close()
