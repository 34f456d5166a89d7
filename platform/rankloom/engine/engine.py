"""ServingEngine: one base, the adapters of a registry, and continuous batching over the sequences of all of them.

The engine's work is `Core.step()` in `core.py`, called by one thread again and again; read it next. Here is what stands
around it: requests go from the event loop into the thread's inbox, and deltas come back (`stream.py`).
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial

import torch

from rankloom.config.engine import EngineConfig
from rankloom.engine.admission import STOPPING, check_ref
from rankloom.engine.core import Core
from rankloom.engine.frontend import EngineFrontend
from rankloom.engine.pauses import allow_pauses, shorten_pauses
from rankloom.engine.protocol import Delta, Request, Resident, Stats
from rankloom.engine.sequence import RunningSequence
from rankloom.engine.stream import Mailbox, Stream
from rankloom.errors import OverloadedError
from rankloom.models import Base
from rankloom.registry import Registry


class ServingEngine(EngineFrontend):
    """The `Engine` of `protocol.py`."""

    def __init__(self, base: Base, registry: Registry, config: EngineConfig) -> None:
        """Raises ModelError where the base's architecture can't be served."""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """Callables that the thread runs between two steps."""
        self._mailbox = Mailbox()
        self._core = Core(base, registry, config, post=self._inbox.put, deliver=self._mailbox.deliver)
        super().__init__(base, config, self._core.num_seqs)
        self._thread = threading.Thread(target=self._run, name="rankloom-engine", daemon=True)

    @property
    def context(self) -> int:
        return self._core.context

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    async def start(self) -> None:
        self._mailbox.open()
        await asyncio.to_thread(self._guides.open)
        shorten_pauses()
        self._thread.start()

    async def close(self) -> None:
        self._admission.stopping = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._guides.close()
        allow_pauses()

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        self._check_pooling(request.pooling)
        with self._admission.take(request, self.context):
            guide = await self._guides.make_guide(request)
            self._admission.refuse_if_stopping()  # meanwhile
            sequence = RunningSequence(
                request, Stream(self._mailbox), self._get_decoder(request), self._prompts.end_ids, guide, self.context
            )
            self._inbox.put(partial(self._core.enter, sequence))
            try:
                async for delta in sequence.stream:
                    yield delta
            finally:
                self._inbox.put(partial(self._core.leave, sequence))

    async def pin(self, ref: str) -> None:
        self._admission.refuse_if_stopping()
        check_ref(ref)
        done: Future[None] = Future()
        self._inbox.put(partial(self._core.adapters.pin, ref, done))
        await asyncio.wrap_future(done)

    async def unpin(self, ref: str) -> None:
        self._inbox.put(partial(self._core.adapters.unpin, ref))

    def list_resident(self) -> tuple[Resident, ...]:
        return self._core.adapters.list_resident()

    def get_stats(self) -> Stats:
        return self._core.get_stats()

    def _run(self) -> None:
        """Compute steps until the engine closes, in a thread of its own."""
        with torch.inference_mode():
            try:
                while not self._admission.stopping:
                    self._run_inbox()
                    worked = self._core.step()
                    self._mailbox.deliver()
                    # until something comes in; `close` wakes it, but `_run_inbox` may have taken that already
                    if not worked and not self._admission.stopping:
                        self._inbox.get()()
                        self._mailbox.wait_for_turn()
            finally:  # also after a bug, so that every waiting request ends
                self._admission.stopping = True
                self._run_inbox()
                self._core.close(OverloadedError(STOPPING))
                self._mailbox.deliver()

    def _run_inbox(self) -> None:
        while True:
            try:
                call = self._inbox.get_nowait()
            except queue.Empty:
                return
            call()
