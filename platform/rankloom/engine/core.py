"""Core: the rows under way, and the step that carries all of them on.

`Core.step()` is the engine: it *plans* who has a row and what is computed (`scheduler.py`), *computes* one forward
(`model_runner.py`) and *applies* the result: a token for each row that predicts, its text, its end. One thread owns a
core and makes all calls; it knows no event loop. `engine.py` is around it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankloom.banks.served_adapter import ServedAdapter
from rankloom.config.engine import EngineConfig
from rankloom.engine.adapter_cache.cache import AdapterCache
from rankloom.engine.adapter_cache.loading import EngineLoader
from rankloom.engine.kv_cache import KvCache, room_for, shelf_width
from rankloom.engine.model_runner import ModelRunner, SequenceChunk
from rankloom.engine.prefix import PrefixTree
from rankloom.engine.protocol import Stats
from rankloom.engine.sampling import LARGEST, sample_tokens
from rankloom.engine.scheduler import ScheduledChunk, SequenceState, StepBudget, change_batch, halved, schedule
from rankloom.engine.sequence import RunningSequence
from rankloom.errors import ModelError, OverloadedError, RankloomError, RegistryError
from rankloom.models import Base
from rankloom.models.device import is_lost
from rankloom.registry import Registry

logger = logging.getLogger(__name__)


@dataclass
class _Counted:
    """The counters of `Stats`."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


class Core:
    """Invariant: a row is waiting, or running with a place in the cache; its adapter is in use all the while."""

    def __init__(
        self, base: Base, registry: Registry, config: EngineConfig, post: Callable[[Callable[[], None]], None]
    ) -> None:
        """Args: post: has something called in the core's thread soon; from any thread.

        Raises ModelError where the base's architecture can't be served.
        """
        self._base, self._config = base, config
        self._runner = ModelRunner(base.model, pack=config.pack_weights)
        self.num_rows = config.num_seqs(on_gpu=base.device.type != "cpu")
        longest = _longest(base.model)
        self.cache_tokens = config.kv_cache_tokens or room_for(self._runner.shape, self.num_rows, longest)
        widest = 1 << (self.cache_tokens.bit_length() - 1)  # of the shelves that the cache has room for
        self.context = min(widest, longest or widest)
        """The most tokens of a row."""
        self._cache = KvCache(self._runner.shape, self.cache_tokens)
        self._prefixes = PrefixTree(config.prefix_cache_tokens)
        loader = EngineLoader(base, registry, self._logits_alone)
        self.adapters = AdapterCache(config.max_cpu_loras, loader, post, failed=self._fail_waiting)
        self._running: dict[str, RunningSequence] = {}
        self._waiting: dict[str, RunningSequence] = {}
        self._arrivals = itertools.count()
        self._counted = _Counted()

    def enter(self, row: RunningSequence) -> None:
        """A request comes in."""
        adapter = row.request.adapter
        if adapter is not None and (refusal := self.adapters.refusal(adapter)) is not None:
            row.ended = True
            row.stream.fail(refusal)
            return
        row.arrival = next(self._arrivals)
        self._waiting[row.request.id] = row
        if adapter is not None:
            self.adapters.ask(adapter)

    def leave(self, row: RunningSequence) -> None:
        """Whoever asked is gone, or has everything."""
        if not row.ended:
            self._end(row)

    def close(self, error: RankloomError) -> None:
        """End all that is under way."""
        for row in (*self._running.values(), *self._waiting.values()):
            row.stream.fail(error)
        self.adapters.close(error)
        self._runner.close()

    def stats(self) -> Stats:
        """From any thread."""
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            cache_tokens=self._cache.held + self._prefixes.num_tokens,
            cache_capacity=self.cache_tokens + self._config.prefix_cache_tokens,
            adapter_loads=self.adapters.num_loads,
            adapter_evictions=self.adapters.num_evictions,
            adapter_failures=self.adapters.num_failures,
            **vars(self._counted),
        )

    def step(self) -> bool:
        """One round: plan, compute, apply. False: there was nothing to compute.

        Where memory runs out, kept prefixes are forgotten, then rows wait, and one that does not fit alone is refused.
        Raises what lost the device: no other step can do better.
        """
        self.adapters.load_next()
        num_waiting = len(self._waiting)
        portions = self._plan()
        if not portions:
            return len(self._waiting) < num_waiting  # some were refused, so that others may have a place
        try:
            portions, logits_MV = self._compute(portions)
            if portions:
                self._apply(portions, logits_MV)
        except Exception as error:  # these rows are lost, the engine is not
            if is_lost(error):
                raise
            logger.exception("a step failed")
            for p in portions:
                if p.id in self._running:
                    self._end(self._running[p.id], ModelError(f"a step of the engine failed: {error}"))
        return True

    def _plan(self) -> Sequence[ScheduledChunk]:
        if not self._running:
            self._cache.capacity = self.cache_tokens  # what lacked memory has ended
        budget = StepBudget(self.num_rows, self._cache.capacity, self._config.max_num_batched_tokens)
        following = self._following()
        waiting = [self._seat(row, ready=row not in following) for row in self._waiting.values()]
        seating = change_batch([self._seat(row) for row in self._running.values()], waiting, budget, shelf_width)
        for name in seating.preempted:
            self._keep_prefix(self._running[name])
            self._preempt(self._running[name])
        for name in seating.admitted:
            row = self._running[name] = self._waiting.pop(name)
            row.adapter = self._adapter_of(row)
            if not self._reserve(row):
                break
            self._reuse_prefix(row)
        return schedule([self._seat(row) for row in self._running.values()], budget)

    def _compute(self, portions: Sequence[ScheduledChunk]) -> tuple[Sequence[ScheduledChunk], Tensor]:
        """The portions that there is memory for, and what follows those of them that predict."""
        portions = [p for p in portions if self._reserve(self._running[p.id])]
        while portions:
            rows = [self._running[p.id] for p in portions]
            works = [
                SequenceChunk(p.id, row.adapter, p.start, row.tokens[p.start : p.start + p.count], p.predicts)
                for p, row in zip(portions, rows, strict=True)
            ]
            try:
                return portions, self._runner.forward(self._cache, works)
            except torch.OutOfMemoryError:
                pass  # what the forward holds on to is freed once this block is left
            self._prefixes.clear()
            if len(portions) == portions[0].count == 1:
                self._end(rows[0], _too_large(rows[0]))
                break
            portions = halved(portions)
        return (), torch.empty(0)

    def _reserve(self, row: RunningSequence) -> bool:
        """A place in the cache for all of a running row's tokens. False: there is no memory for it, it runs no more."""
        name = row.request.id
        for _ in range(2):
            try:
                self._cache.reserve(name, len(row.tokens))
                return True
            except torch.OutOfMemoryError:
                self._prefixes.clear()
        others = [other for other in self._running if other != name and other in self._cache]
        if not others:
            self._end(row, _too_large(row))
            return False
        self._preempt(row)
        self._cache.capacity = self._cache.held  # until they have ended
        return False

    def _preempt(self, row: RunningSequence) -> None:
        """Have a running row wait; it is computed again."""
        name = row.request.id
        self._waiting[name] = self._running.pop(name)
        if name in self._cache:
            self._cache.remove(name)
        row.cached = 0
        self._counted.preemptions += 1

    def _apply(self, portions: Sequence[ScheduledChunk], logits_MV: Tensor) -> None:
        self._counted.steps += 1
        for p in portions:
            row = self._running[p.id]
            row.cached += p.count
            new_to_prompt = max(0, min(p.start + p.count, row.num_prompt) - p.start)
            self._counted.prompt_tokens += new_to_prompt
            if new_to_prompt and row.cached >= row.num_prompt:
                self._keep_prefix(row)
        rows = [self._running[p.id] for p in portions if p.predicts]
        least_M, most_M = logits_MV.amin(-1), logits_MV.amax(-1)  # on a CPU 13 times as fast as aminmax
        sound = ((least_M > -LARGEST) & (most_M < LARGEST)).tolist()  # which nan is not
        for row, is_sound in zip(rows, sound, strict=True):
            if not is_sound:
                where = row.request.adapter or "the base"
                self._end(row, RegistryError(f"{where}: gives logits that are not within {LARGEST:g}"))
        logits_MV = logits_MV if all(sound) else logits_MV[torch.tensor(sound, device=logits_MV.device)]
        rows = [row for row, is_sound in zip(rows, sound, strict=True) if is_sound]
        for row, chosen in zip(rows, sample_tokens(logits_MV, [row.turn() for row in rows]), strict=True):
            self._counted.generated_tokens += 1
            if row.take(chosen):
                self._end(row)

    def _end(self, row: RunningSequence, error: RankloomError | None = None) -> None:
        """Give a row's place up; its stream gets the error, if there is one."""
        name = row.request.id
        if self._running.pop(name, None) is not None and name in self._cache:
            if error is None:
                self._keep_prefix(row)
            self._cache.remove(name)
        self._waiting.pop(name, None)
        if row.request.adapter is not None and not row.ended:
            self.adapters.release(row.request.adapter)
        row.ended = True
        if error is not None:
            row.stream.fail(error)

    def _seat(self, row: RunningSequence, *, ready: bool = True) -> SequenceState:
        ready = ready and (row.request.adapter is None or self.adapters.get(row.request.adapter) is not None)
        return SequenceState(row.request.id, row.arrival, len(row.tokens), row.cached, ready)

    def _following(self) -> set[RunningSequence]:
        """Waiting rows that begin like one before them whose beginning is being computed, or will be first.

        Several completions of one prompt come at once, as do requests with one system prompt: it is computed once.
        """
        if not self._config.prefix_cache_tokens:
            return set()
        leading = {row.beginning for row in self._running.values() if row.cached < row.num_prompt}
        following = set()
        for row in sorted(self._waiting.values(), key=lambda row: row.arrival):
            if row.beginning in leading and not self._prefixes.match(row.whose, row.tokens)[0]:
                following.add(row)
            elif row.beginning is not None:
                leading.add(row.beginning)
        return following

    def _adapter_of(self, row: RunningSequence) -> ServedAdapter | None:
        return None if row.request.adapter is None else self.adapters.get(row.request.adapter)

    def _reuse_prefix(self, row: RunningSequence) -> None:
        length, pieces = self._prefixes.match(row.whose, row.tokens[:-1])
        for piece in pieces:
            self._cache.write(row.request.id, row.cached, piece)
            row.cached += piece.shape[-2]
        if not row.generated:  # not of one that was preempted
            row.num_reused = length
            self._counted.cached_tokens += length

    def _keep_prefix(self, row: RunningSequence) -> None:
        if self._config.prefix_cache_tokens:
            read = partial(self._cache.read, row.request.id)
            try:
                self._prefixes.insert(row.whose, row.tokens[: row.cached], read)
            except torch.OutOfMemoryError:
                self._prefixes.clear()

    def _fail_waiting(self, ref: str, error: RankloomError) -> None:
        for row in [row for row in self._waiting.values() if row.request.adapter == ref]:
            self._end(row, error)

    def _logits_alone(self, adapter: ServedAdapter | None, tokens: list[int]) -> Tensor:
        """[V]; from any thread, beside the core's own forwards, with a cache of its own."""
        cache = KvCache(self._runner.shape, shelf_width(len(tokens)))
        if adapter is not None:
            self._runner.bank.admit(adapter)
        with torch.inference_mode():
            cache.reserve("probe", len(tokens))
            logits_MV = self._runner.forward(cache, [SequenceChunk("probe", adapter, 0, tokens)], stack=False)
        return logits_MV[0].to(self._base.model.dtype)


def _longest(model: PreTrainedModel) -> int | None:
    """Tokens of a row that a base knows positions for; None: any number."""
    shape = model.config.get_text_config()
    known = [getattr(shape, "max_position_embeddings", None)]
    rope = getattr(shape, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # which turns all rows of a step by other angles beyond this
        known.append(rope["original_max_position_embeddings"])
    return min(filter(None, known), default=None)


def _too_large(row: RunningSequence) -> OverloadedError:
    return OverloadedError(f"there is no memory for a request of {len(row.tokens)} tokens now; try again later")
