"""ServingEngine: one base, the adapters of a registry, and continuous batching over the rows of all of them.

The engine's work is `Core.step()` in `core.py`, called by one thread again and again; read it next. Here is what stands
around it: requests go from the event loop into the thread's inbox, and deltas come back (`stream.py`).
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import torch

from rankloom.config.engine import EngineConfig
from rankloom.errors import OverloadedError, RankloomError, RequestError
from rankloom.models import Base
from rankloom.registry import Registry
from rankloom.registry.store import parse_ref
from rankloom.serving.choices import Choice
from rankloom.serving.core import Core
from rankloom.serving.prompts import Prompts
from rankloom.serving.protocol import Delta, Request, Resident, Stats
from rankloom.serving.row import Row
from rankloom.serving.stream import Mailbox, Stream

SWITCH_S = 0.0005
"""How long one Python thread keeps others waiting; the longest gaps between tokens while adapters are loaded were
measured to be a third of those at Python's 5 ms."""


class ServingEngine:
    """The `Engine` of `protocol.py`."""

    def __init__(self, base: Base, registry: Registry, config: EngineConfig) -> None:
        """Raises ModelError where the base's architecture can't be served."""
        self._base, self._config = base, config
        self._prompts = Prompts(base.tokenizer, base.model)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """What the thread is to call between two steps."""
        self._mailbox = Mailbox()
        self._core = Core(base, registry, config, post=self._inbox.put)
        self._open: set[str] = set()
        """Ids of the requests under way."""
        self._thread = threading.Thread(target=self._run, name="rankloom-engine", daemon=True)
        self._stopping = False

    @property
    def base_id(self) -> str:
        return self._base.id

    @property
    def context(self) -> int:
        widest = 1 << (self._config.cache_tokens.bit_length() - 1)  # of the shelves that the cache has room for
        own = getattr(self._base.model.config, "max_position_embeddings", None)
        return min(widest, own or widest)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    async def start(self) -> None:
        self._mailbox.open()
        # of the whole process: else a loading thread's Python may keep the engine's waiting 5 ms at every turn
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        self._thread.start()

    async def close(self) -> None:
        self._stopping = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def tokens(self, text: str) -> list[int]:
        return self._prompts.tokens(text)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self._prompts.chat(messages)

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        row = self._checked(request)
        self._open.add(request.id)
        self._inbox.put(partial(self._core.enter, row))
        try:
            async for delta in row.stream:
                yield delta
        finally:
            self._open.discard(request.id)
            self._inbox.put(partial(self._core.leave, row))

    async def pin(self, ref: str) -> None:
        self._refuse_if_stopping()
        _check_ref(ref)
        done: Future[None] = Future()
        self._inbox.put(partial(self._core.adapters.pin, ref, done))
        await asyncio.wrap_future(done)

    async def unpin(self, ref: str) -> None:
        self._inbox.put(partial(self._core.adapters.unpin, ref))

    def resident(self) -> tuple[Resident, ...]:
        return self._core.adapters.listed()

    def stats(self) -> Stats:
        return self._core.stats()

    def _checked(self, request: Request) -> Row:
        self._refuse_if_stopping()
        limit = self._config.rows + self._config.waiting
        if len(self._open) >= limit:
            raise OverloadedError(f"{limit} requests are under way or waiting already; try again later")
        if request.id in self._open:
            raise RequestError(f"id: {request.id!r} is under way already; give each request its own")
        if request.adapter is not None:
            _check_ref(request.adapter)
        prompt, vocabulary = request.prompt, self._base.model.get_input_embeddings().weight.shape[0]
        if not prompt:
            raise RequestError("prompt: empty; give at least one token")
        if not all(0 <= token < vocabulary for token in prompt):
            raise RequestError(f"prompt: a token is outside of the vocabulary of {vocabulary}")
        if len(prompt) >= self.context:
            raise RequestError(
                f"prompt: {len(prompt)} tokens leave no room for an answer; prompt and answer together can have "
                f"{self.context}"
            )
        choice = None if request.sampling.choices is None else Choice(request.sampling.choices, self._prompts)
        return Row(request, Stream(self._mailbox), self._base.tokenizer, self._prompts.end_ids, choice, self.context)

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise OverloadedError("the engine is stopping; try another replica")

    def _run(self) -> None:
        """The engine's thread."""
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._take_in()
                    worked = self._core.step()
                    self._mailbox.deliver()
                    # until something comes in; `close` wakes it, but `_take_in` may have taken that already
                    if not worked and not self._stopping:
                        self._inbox.get()()
        finally:  # also where a bug ends it: nobody is left waiting
            self._stopping = True
            self._take_in()
            self._core.close(OverloadedError("the engine is stopping; try another replica"))
            self._mailbox.deliver()

    def _take_in(self) -> None:
        while True:
            try:
                call = self._inbox.get_nowait()
            except queue.Empty:
                return
            call()


def _check_ref(ref: str) -> None:
    try:
        _, version = parse_ref(ref)
    except RankloomError as error:
        raise RequestError(f"adapter: {error}") from None
    if version is None or not version.isdigit():
        raise RequestError(f"adapter: {ref!r} names no exact version; give one such as {ref.split('@')[0]}@1")
