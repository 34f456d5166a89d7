"""ServingEngine: one base, the adapters of a registry, and continuous batching over the rows of all of them.

One thread owns everything and calls `step()` again and again: it takes what came in, *plans* who has a row and what is
computed (`scheduler.py`), *computes* one forward (`runner.py`) and *applies* the result: a token for each row that
predicts, its text, its end. A second thread loads adapters (`loading.py`), so that a cold one holds up only its own
requests. What runs on the event loop only puts requests in and takes deltas out (`stream.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rankloom.adapters.folded import Folded
from rankloom.config.engine import EngineConfig
from rankloom.errors import ModelError, OverloadedError, RankloomError, RegistryError, RequestError
from rankloom.models import Base
from rankloom.registry import Registry
from rankloom.serving.cache import RowCache, shelf_width
from rankloom.serving.choices import Choice
from rankloom.serving.loading import Loader
from rankloom.serving.prefix import PrefixTree
from rankloom.serving.prompts import Prompts
from rankloom.serving.protocol import Delta, Request, Resident, Stats
from rankloom.serving.residency import Residency
from rankloom.serving.row import Row
from rankloom.serving.runner import Runner, Work
from rankloom.serving.sampling import choose
from rankloom.serving.scheduler import Budget, Portion, Seat, portion, seat
from rankloom.serving.stream import Mailbox, Stream
from rankloom.serving.text import Pieces

logger = logging.getLogger(__name__)


@dataclass
class _Counted:
    """The counters of `Stats`."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    adapter_failures: int = 0


class ServingEngine:
    """The `Engine` of `protocol.py`."""

    def __init__(self, base: Base, registry: Registry, config: EngineConfig) -> None:
        """Raises ModelError where the base's architecture can't be served."""
        self._base, self._config = base, config
        self._runner = Runner(base.model)
        self._cache = RowCache(self._runner.shape, config.cache_tokens)
        self._prefixes = PrefixTree(config.prefix_tokens)
        self._budget = Budget(config.rows, config.cache_tokens, config.step_tokens)
        self._prompts, self._pieces = Prompts(base.tokenizer, base.model), Pieces(base.tokenizer)
        self._residency: Residency[Folded] = Residency(config.resident)
        self._loader = Loader(base, registry, self._logits_alone)
        self._loads = ThreadPoolExecutor(1, thread_name_prefix="rankloom-load")
        self._running: dict[str, Row] = {}
        self._waiting: dict[str, Row] = {}
        self._pins: dict[str, list[Future[None]]] = {}
        self._arrivals = itertools.count()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._mailbox = Mailbox()
        self._open: set[str] = set()
        """Ids of the requests under way, as the event loop knows them."""
        self._thread = threading.Thread(target=self._run, name="rankloom-engine", daemon=True)
        self._stopping = False
        self._counted = _Counted()

    # ---- for the event loop

    @property
    def base_id(self) -> str:
        return self._base.id

    @property
    def context(self) -> int:
        widest = 1 << (self._config.cache_tokens.bit_length() - 1)  # of the shelves that the cache has room for
        own = getattr(self._base.model.config, "max_position_embeddings", None)
        return min(widest, own or widest)

    async def start(self) -> None:
        self._mailbox.open()
        self._thread.start()

    async def close(self) -> None:
        self._stopping = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._loads.shutdown(wait=False, cancel_futures=True)

    def tokens(self, text: str) -> list[int]:
        return self._prompts.tokens(text)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self._prompts.chat(messages)

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        row = self._checked(request)
        self._open.add(request.id)
        self._inbox.put(partial(self._enter, row))
        try:
            async for delta in row.stream:
                yield delta
        finally:
            self._open.discard(request.id)
            self._inbox.put(partial(self._leave, row))

    async def pin(self, ref: str) -> None:
        if self._stopping:
            raise OverloadedError("the engine is stopping")
        done: Future[None] = Future()
        self._inbox.put(partial(self._pin, ref, done))
        await asyncio.wrap_future(done)

    async def unpin(self, ref: str) -> None:
        self._inbox.put(partial(self._residency.unpin, ref))

    def resident(self) -> tuple[Resident, ...]:
        entries = list(self._residency.entries.items())
        return tuple(
            Resident(ref, entry.pinned, entry.users, entry.adapter.num_bytes)
            for ref, entry in entries
            if entry.adapter is not None
        )

    def stats(self) -> Stats:
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            cache_tokens=self._cache.held + self._prefixes.num_tokens,
            cache_capacity=self._config.cache_tokens + self._config.prefix_tokens,
            **vars(self._counted),
        )

    def _checked(self, request: Request) -> Row:
        if self._stopping:
            raise OverloadedError("the engine is stopping; try another replica")
        limit = self._config.rows + self._config.waiting
        if len(self._open) >= limit:
            raise OverloadedError(f"{limit} requests are under way or waiting already; try again later")
        if request.id in self._open:
            raise RequestError(f"id: {request.id!r} is under way already; give each request its own")
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

    # ---- for the engine's thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stopping:
                    if not self.step():
                        self._inbox.get()()  # nothing to do until something comes in
        finally:  # also where a bug ends it: nobody is left waiting
            self._stopping = True
            stopping = OverloadedError("the engine is stopping; try another replica")
            for row in (*self._running.values(), *self._waiting.values()):
                row.stream.fail(stopping)
            for done in (done for waiting in self._pins.values() for done in waiting):
                done.set_exception(stopping)
            self._mailbox.deliver()
            self._runner.close()

    def step(self) -> bool:
        """One round of the engine: plan, compute, apply. False: there was nothing to compute."""
        self._take_in()
        portions = self._plan()
        if not portions:
            self._mailbox.deliver()
            return False
        try:
            logits_MV = self._compute(portions)
            self._apply(portions, logits_MV)
        except Exception as error:  # these rows are lost, the engine is not
            logger.exception("a step failed")
            for p in portions:
                if p.id in self._running:
                    self._end(self._running[p.id], ModelError(f"a step of the engine failed: {error}"))
        self._mailbox.deliver()
        return True

    def _take_in(self) -> None:
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                break
        while (load := self._residency.next_load()) is not None:
            ref, evicted = load
            self._counted.adapter_evictions += evicted is not None
            self._loads.submit(self._loader.load, ref).add_done_callback(partial(self._post_loaded, ref))

    def _plan(self) -> tuple[Portion, ...]:
        following = self._following()
        waiting = [self._seat(row, ready=row not in following) for row in self._waiting.values()]
        seating = seat([self._seat(row) for row in self._running.values()], waiting, self._budget, shelf_width)
        for name in seating.preempted:
            row = self._waiting[name] = self._running.pop(name)
            self._keep_prefix(row)
            self._cache.remove(name)
            row.cached = 0
            self._counted.preemptions += 1
        for name in seating.admitted:
            row = self._running[name] = self._waiting.pop(name)
            row.adapter = self._adapter_of(row)
            self._reuse_prefix(row)
        return portion([self._seat(row) for row in self._running.values()], self._budget)

    def _compute(self, portions: Sequence[Portion]) -> Tensor:
        works = []
        for p in portions:
            row = self._running[p.id]
            self._cache.reserve(p.id, len(row.tokens))
            works.append(Work(p.id, row.adapter, p.start, row.tokens[p.start : p.start + p.count], p.predicts))
        return self._runner.forward(self._cache, works)

    def _apply(self, portions: Sequence[Portion], logits_MV: Tensor) -> None:
        self._counted.steps += 1
        for p in portions:
            row = self._running[p.id]
            row.cached += p.count
            new_to_prompt = max(0, min(p.start + p.count, row.num_prompt) - p.start)
            self._counted.prompt_tokens += new_to_prompt
            if new_to_prompt and row.cached >= row.num_prompt:
                self._keep_prefix(row)
        rows = [self._running[p.id] for p in portions if p.predicts]
        sound = logits_MV.isfinite().all(-1).tolist()
        for row, is_sound in zip(rows, sound, strict=True):
            if not is_sound:
                where = row.request.adapter or self._base.id
                self._end(row, RegistryError(f"{where}: gives values that are no finite numbers"))
        logits_MV = logits_MV if all(sound) else logits_MV[torch.tensor(sound, device=logits_MV.device)]
        rows = [row for row, is_sound in zip(rows, sound, strict=True) if is_sound]
        for row, chosen in zip(rows, choose(logits_MV, [row.turn() for row in rows]), strict=True):
            self._counted.generated_tokens += 1
            if row.take(chosen, self._pieces):
                self._end(row)

    def _end(self, row: Row, error: RankloomError | None = None) -> None:
        """Give a row's place up; its stream gets the error, if there is one."""
        name = row.request.id
        if self._running.pop(name, None) is not None and name in self._cache:
            if error is None:
                self._keep_prefix(row)
            self._cache.remove(name)
        self._waiting.pop(name, None)
        if row.request.adapter is not None and not row.ended:
            self._residency.release(row.request.adapter)
        row.ended = True
        if error is not None:
            row.stream.fail(error)

    def _seat(self, row: Row, *, ready: bool = True) -> Seat:
        ready = ready and (row.request.adapter is None or self._residency.get(row.request.adapter) is not None)
        return Seat(row.request.id, row.arrival, len(row.tokens), row.cached, ready)

    def _following(self) -> set[Row]:
        """Waiting rows that begin like one before them whose beginning is being computed, or will be first.

        Several completions of one prompt come at once, as do requests with one system prompt: it is computed once.
        """
        if not self._config.prefix_tokens:
            return set()
        leading = {row.beginning for row in self._running.values() if row.cached < row.num_prompt}
        following = set()
        for row in sorted(self._waiting.values(), key=lambda row: row.arrival):
            if row.beginning in leading and not self._prefixes.match(row.request.adapter, row.tokens)[0]:
                following.add(row)
            elif row.beginning is not None:
                leading.add(row.beginning)
        return following

    def _adapter_of(self, row: Row) -> Folded | None:
        return None if row.request.adapter is None else self._residency.get(row.request.adapter)

    def _reuse_prefix(self, row: Row) -> None:
        self._cache.reserve(row.request.id, len(row.tokens))
        length, pieces = self._prefixes.match(row.request.adapter, row.tokens[:-1])
        for piece in pieces:
            self._cache.write(row.request.id, row.cached, piece)
            row.cached += piece.shape[-2]
        if not row.generated:  # not of one that was preempted
            row.num_reused = length
            self._counted.cached_tokens += length

    def _keep_prefix(self, row: Row) -> None:
        if self._config.prefix_tokens:
            read = partial(self._cache.read, row.request.id)
            self._prefixes.insert(row.request.adapter, row.tokens[: row.cached], read)

    # ---- what comes in

    def _enter(self, row: Row) -> None:
        row.arrival = next(self._arrivals)
        self._waiting[row.request.id] = row
        if row.request.adapter is not None:
            self._residency.ask(row.request.adapter)

    def _leave(self, row: Row) -> None:
        if not row.ended:
            self._end(row)

    def _pin(self, ref: str, done: Future[None]) -> None:
        if not self._residency.pin(ref):
            done.set_exception(
                OverloadedError(f"{ref} can't be pinned: all {self._config.resident} places are; unpin another")
            )
        elif self._residency.get(ref) is not None:
            done.set_result(None)
        else:
            self._pins.setdefault(ref, []).append(done)

    def _loaded(self, ref: str, load: Future[Folded]) -> None:
        error, waiting = load.exception(), self._pins.pop(ref, [])
        if error is None:
            adapter = load.result()
            self._runner.bank.admit(adapter)
            self._residency.loaded(ref, adapter)
            self._counted.adapter_loads += 1
            for done in waiting:
                done.set_result(None)
            return
        if not isinstance(error, RankloomError):
            logger.error("loading %s failed", ref, exc_info=error)
            error = RegistryError(f"{ref}: can't be loaded: {error}")
        self._counted.adapter_failures += 1
        for row in [row for row in self._waiting.values() if row.request.adapter == ref]:
            self._end(row, error)
        self._residency.failed(ref)
        for done in waiting:
            done.set_exception(error)

    # ---- for the loading thread

    def _post_loaded(self, ref: str, load: Future[Folded]) -> None:
        self._inbox.put(partial(self._loaded, ref, load))

    def _logits_alone(self, adapter: Folded | None, tokens: list[int]) -> Tensor:
        """[V]; beside the engine's own forwards, with a cache of its own."""
        cache = RowCache(self._runner.shape, shelf_width(len(tokens)))
        if adapter is not None:
            self._runner.bank.admit(adapter)
        with torch.inference_mode():
            cache.reserve("probe", len(tokens))
            logits_MV = self._runner.forward(cache, [Work("probe", adapter, 0, tokens)], stack=False)
        return logits_MV[0].to(self._base.model.dtype)
