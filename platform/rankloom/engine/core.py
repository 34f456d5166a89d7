"""Core: the sequences that run or wait, and the step that advances all of them.

`Core.step()` is the engine: it *plans* which sequences run and what is computed (`scheduler.py`), *computes* one
forward (`runner.py`) and *applies* the result: a token for each sequence that predicts, its text, its end. One
thread owns a core and makes all calls; it knows no event loop. `engine.py` is around it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rankloom.banks.served_adapter import ServedAdapter
from rankloom.config.engine import EngineConfig
from rankloom.engine.adapter_cache.cache import AdapterCache
from rankloom.engine.adapter_cache.loading import EngineLoader
from rankloom.engine.attention import SequenceChunk
from rankloom.engine.frontend import count_vocabulary
from rankloom.engine.kv_cache import KvCache, choose_bucket_width, choose_capacity, choose_prefix_capacity, find_longest
from rankloom.engine.masks import Masker
from rankloom.engine.open_predictor import open_predictor, open_runner
from rankloom.engine.predictor import StepResult
from rankloom.engine.prefix import WORTHWHILE, PrefixTree
from rankloom.engine.protocol import Stats
from rankloom.engine.runner import PromptOutputs
from rankloom.engine.sampling import LARGEST, SamplingInput
from rankloom.engine.scheduler import ScheduledChunk, SequenceState, StepBudget, change_batch, halve, schedule
from rankloom.engine.sequence import RunningSequence
from rankloom.errors import ModelError, OverloadedError, RankloomError, RegistryError, RequestError
from rankloom.models import Base
from rankloom.models.device import free_cuda_bytes, is_lost
from rankloom.registry import Registry

logger = logging.getLogger(__name__)

MOST_SINGLE = 16
"""Most tokens after a known prefix that are computed one by one, where layers can't continue otherwise."""


@dataclass
class _Counters:
    """The counters of `Stats`."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


class Core:
    """Invariant: a sequence waits, or runs with a place in the cache; until its end its adapter is in use."""

    def __init__(
        self,
        base: Base,
        registry: Registry,
        config: EngineConfig,
        post: Callable[[Callable[[], None]], None],
        deliver: Callable[[], None],
    ) -> None:
        """
        Args:
            post: thread-safe; schedules a callable on the engine thread.
            deliver: brings what the streams were sent to their readers.

        Raises:
            ModelError: the base's architecture can't be served.
        """
        self._base = base
        self._runner = open_runner(base.model, pack=config.pack_weights)
        on_gpu = base.device.type != "cpu"
        self.num_seqs = config.resolve_num_seqs(on_gpu=on_gpu)
        self._num_tokens = config.resolve_num_tokens(on_gpu=on_gpu)
        longest, shape = find_longest(base.model), self._runner.shape
        free = free_cuda_bytes(base.device) if base.device.type == "cuda" else None
        kept = config.prefix_cache_tokens
        kept = choose_prefix_capacity(shape, free) if kept is None else kept
        self._prefixes = PrefixTree(kept, shape.tokens_per_states)
        wanted = config.kv_cache_tokens or choose_capacity(shape, free, self.num_seqs, longest)
        self._cache, self._predictor = open_predictor(self._runner, wanted, longest, self.num_seqs, config)
        self.cache_tokens = self._cache.capacity
        self.context = min(self._cache.longest, longest or self._cache.longest)
        """The most tokens of a sequence."""
        loader = EngineLoader(base, registry, self._compute_logits, rounds=self._runner.bank.compiles)
        self.adapters = AdapterCache(config.max_cpu_loras, loader, post, failed=self._fail_waiting)
        self._masker = Masker(count_vocabulary(base), wake=lambda: post(lambda: None))
        self._deliver = deliver
        self._unsent: list[RunningSequence] = []
        """Sequences whose last token was taken, and not sent yet."""
        self._running: dict[str, RunningSequence] = {}
        self._waiting: dict[str, RunningSequence] = {}
        self._arrivals = itertools.count()
        self._counters = _Counters()

    def enter(self, sequence: RunningSequence) -> None:
        """Queue a new sequence."""
        adapter = sequence.request.adapter
        if adapter is not None and (refusal := self.adapters.get_refusal(adapter)) is not None:
            sequence.ended = True
            sequence.stream.fail(refusal)
            return
        sequence.arrival = next(self._arrivals)
        self._waiting[sequence.request.id] = sequence
        if adapter is not None:
            self.adapters.ask(adapter)

    def leave(self, sequence: RunningSequence) -> None:
        """End a sequence whose client has left, or has everything."""
        if not sequence.ended:
            self._end(sequence)

    def close(self, error: RankloomError) -> None:
        """Fail every sequence with `error`, and give the model back."""
        for sequence in (*self._running.values(), *self._waiting.values()):
            sequence.stream.fail(error)
        self.adapters.close(error)
        self._masker.close()
        self._runner.close()

    def get_stats(self) -> Stats:
        """Return the counters. Thread-safe."""
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            cache_tokens=self._cache.held + self._prefixes.num_tokens,
            cache_capacity=self.cache_tokens + self._prefixes.capacity,
            adapter_loads=self.adapters.num_loads,
            adapter_evictions=self.adapters.num_evictions,
            adapter_failures=self.adapters.num_failures,
            **vars(self._counters),
        )

    def step(self) -> bool:
        """Plan, compute and apply one step. Returns False where there was nothing to compute.

        When memory runs out, kept prefixes are dropped, then sequences wait; one that does not fit alone is refused.
        Raises the error that lost the device, as no later step can succeed.
        """
        self.adapters.load_next()
        num_waiting = len(self._waiting)
        chunks = self._plan()
        if not chunks:
            self._send()
            return len(self._waiting) < num_waiting  # some were refused, which may make place for others
        try:
            chunks, result = self._compute(chunks)
            self._send()  # while the device computes
            if result is not None:
                self._apply(chunks, result)
        except Exception as error:  # these sequences are lost, the engine is not
            if is_lost(error):
                raise
            logger.exception("a step failed")
            for chunk in chunks:
                if chunk.id in self._running:
                    self._end(self._running[chunk.id], ModelError(f"a step of the engine failed: {error}"))
        return True

    def _plan(self) -> Sequence[ScheduledChunk]:
        if not self._running:
            self._cache.capacity = self.cache_tokens  # the sequences that lacked memory have ended
        budget = StepBudget(self.num_seqs, self._cache.capacity, self._num_tokens)
        followers = self._find_followers()
        running = [self._get_state(sequence) for sequence in self._running.values()]
        waiting = [self._get_state(s, ready=s not in followers) for s in self._waiting.values()]
        change = change_batch(running, waiting, budget, self._cache.compute_room)
        for id in change.preempted:
            self._keep_prefix(self._running[id])
            self._preempt(self._running[id])
        for id in change.admitted:
            sequence = self._running[id] = self._waiting.pop(id)
            sequence.adapter = self._get_adapter(sequence)
            if not self._reserve(sequence):
                break
            self._reuse_prefix(sequence)
        ready = [sequence for sequence in self._running.values() if not self._masker.lags(sequence.constraint)]
        return schedule([self._get_state(sequence) for sequence in ready], budget)

    def _compute(self, chunks: Sequence[ScheduledChunk]) -> tuple[Sequence[ScheduledChunk], StepResult | None]:
        """Run the chunks that memory suffices for; returns them, and their result; None: there are none."""
        chunks = [chunk for chunk in chunks if self._reserve(self._running[chunk.id])]
        while chunks:
            sequences = [self._running[chunk.id] for chunk in chunks]
            batch = [self._running[chunk.id].make_chunk(chunk) for chunk in chunks]
            predicting = [s for c, s in zip(chunks, sequences, strict=True) if c.predicts]
            try:
                return chunks, self._predictor.predict(batch, self._make_inputs(predicting))
            except torch.OutOfMemoryError:
                pass  # the memory of the forward is freed once this block is left
            self._prefixes.clear()
            if len(chunks) == chunks[0].count == 1:
                self._end(sequences[0], _make_memory_error(sequences[0]))
                break
            chunks = halve(chunks)
        return (), None

    def _make_inputs(self, sequences: Sequence[RunningSequence]) -> list[SamplingInput]:
        """Make what sampling needs; the masks are found while the step is computed."""
        states = {sequence: sequence.constraint for sequence in sequences if sequence.constraint is not None}
        masks = dict(zip(states, self._masker.begin(list(states.values())), strict=True))
        return [sequence.make_sampling_input(masks.get(sequence)) for sequence in sequences]

    def _reserve(self, sequence: RunningSequence) -> bool:
        """Reserve a place in the cache for a running sequence. Returns False where it can't run for lack of memory."""
        id = sequence.request.id
        for _ in range(2):
            try:
                self._cache.reserve(id, len(sequence.tokens))
                return True
            except torch.OutOfMemoryError:
                self._prefixes.clear()
        others = [other for other in self._running if other != id and other in self._cache]
        if not others:
            self._end(sequence, _make_memory_error(sequence))
            return False
        self._preempt(sequence)
        self._cache.capacity = self._cache.held  # until they have ended
        return False

    def _preempt(self, sequence: RunningSequence) -> None:
        """Make a running sequence wait; it is computed again later."""
        id = sequence.request.id
        self._waiting[id] = self._running.pop(id)
        if id in self._cache:
            self._cache.remove(id)
        sequence.cached = 0
        self._counters.preemptions += 1

    def _apply(self, chunks: Sequence[ScheduledChunk], result: StepResult) -> None:
        self._counters.steps += 1
        predicting = []
        for chunk in chunks:
            sequence = self._running.get(chunk.id)
            if sequence is not None:  # else a stop string has ended it meanwhile
                self._advance(sequence, chunk, result.prompts)
            if chunk.predicts:
                predicting.append(self._running.get(chunk.id))
        for sequence, token in zip(predicting, result.read(), strict=True):
            if sequence is None:
                continue
            if token is None:
                self._end(sequence, _make_logits_error(sequence))
                continue
            if sequence.constraint is not None and (reason := sequence.constraint.error) is not None:
                self._end(sequence, RequestError(f"the completion can't continue in its grammar: {reason}"))
                continue
            self._counters.generated_tokens += 1
            is_over = sequence.take(token)
            if self._predictor.overlaps and not is_over:
                self._unsent.append(sequence)
            elif sequence.send():
                self._end(sequence)

    def _advance(self, sequence: RunningSequence, chunk: ScheduledChunk, prompts: PromptOutputs) -> None:
        sequence.cached += chunk.count
        new_to_prompt = max(0, min(chunk.start + chunk.count, sequence.num_prompt) - chunk.start)
        self._counters.prompt_tokens += new_to_prompt
        if sequence.cached in sequence.stops or (new_to_prompt and sequence.cached >= sequence.num_prompt):
            self._keep_prefix(sequence)
        if not sequence.read_prompt(chunk.start, prompts.logits.get(chunk.id), prompts.hidden.get(chunk.id)):
            self._end(sequence, _make_logits_error(sequence))
        elif sequence.cached >= sequence.num_prompt and not sequence.predicts:
            sequence.send_end()
            self._end(sequence)

    def _send(self) -> None:
        """Send the texts of the last step's tokens, and end the sequences that stop strings end."""
        if self._unsent:
            unsent, self._unsent = self._unsent, []
            for sequence in unsent:
                if not sequence.ended and sequence.send():
                    self._end(sequence)
            self._deliver()

    def _end(self, sequence: RunningSequence, error: RankloomError | None = None) -> None:
        """Remove a sequence; its stream gets the error, if there is one."""
        id = sequence.request.id
        if self._running.pop(id, None) is not None and id in self._cache:
            if error is None:
                self._keep_prefix(sequence)
            self._cache.remove(id)
        self._waiting.pop(id, None)
        if sequence.request.adapter is not None and not sequence.ended:
            self.adapters.release(sequence.request.adapter)
        sequence.ended = True
        if error is not None:
            sequence.stream.fail(error)

    def _get_state(self, sequence: RunningSequence, *, ready: bool = True) -> SequenceState:
        ready = ready and (sequence.request.adapter is None or self.adapters.get(sequence.request.adapter) is not None)
        return SequenceState(
            sequence.request.id, sequence.arrival, len(sequence.tokens), sequence.cached, ready,
            sequence.stops, whole=not self._runner.continues, predicts=sequence.predicts, scored=sequence.is_scored,
        )  # fmt: skip

    def _find_followers(self) -> set[RunningSequence]:
        """Find the waiting sequences that share their beginning with an earlier one that has yet to compute it.

        Several completions of one prompt come at once, as do requests with one system prompt: it is computed once.
        """
        if not self._prefixes.capacity:
            return set()
        leading = {sequence.beginning for sequence in self._running.values() if sequence.cached < sequence.num_prompt}
        followers = set()
        for sequence in sorted(self._waiting.values(), key=lambda sequence: sequence.arrival):
            if sequence.beginning in leading and not self._prefixes.match(sequence.owner, sequence.tokens).length:
                followers.add(sequence)
            elif sequence.beginning is not None:
                leading.add(sequence.beginning)
        return followers

    def _get_adapter(self, sequence: RunningSequence) -> ServedAdapter | None:
        return None if sequence.request.adapter is None else self.adapters.get(sequence.request.adapter)

    def _reuse_prefix(self, sequence: RunningSequence) -> None:
        if sequence.is_read:
            return
        id, last = sequence.request.id, len(sequence.tokens) - 1
        known = self._prefixes.match(sequence.owner, sequence.tokens[:last])
        if self._runner.continues or last - known.length < MOST_SINGLE:
            for piece in known.pieces:
                self._cache.write(id, sequence.cached, piece)
                sequence.cached += piece.shape[-2]
            if known.states:
                self._cache.states[id] = known.states
        if self._runner.shape.bytes_per_sequence and self._prefixes.capacity:
            # after these there are no other chances to keep states: a sequence with the same prompt needs them before
            # its last token, one with the same beginning where they differ
            branches = (known.num_agreeing,) if self._runner.continues else ()
            sequence.stops = tuple(at for at in (*branches, last) if at - sequence.cached >= WORTHWHILE)
        if not sequence.generated:  # not of a sequence that was preempted
            sequence.num_reused = sequence.cached
            self._counters.cached_tokens += sequence.cached

    def _keep_prefix(self, sequence: RunningSequence) -> None:
        if self._prefixes.capacity:
            id = sequence.request.id
            try:
                states = tuple(state.clone() for state in self._cache.states.get(id, ()))
                read = partial(self._cache.read, id)
                self._prefixes.insert(sequence.owner, sequence.tokens[: sequence.cached], read, states)
            except torch.OutOfMemoryError:
                self._prefixes.clear()

    def _fail_waiting(self, ref: str, error: RankloomError) -> None:
        for sequence in [sequence for sequence in self._waiting.values() if sequence.request.adapter == ref]:
            self._end(sequence, error)

    def _compute_logits(self, adapter: ServedAdapter | None, tokens: list[int]) -> Tensor:
        """Return the logits [V] after `tokens`. Thread-safe: it has a cache of its own."""
        cache = KvCache(self._runner.shape, choose_bucket_width(len(tokens)))
        if adapter is not None:
            self._runner.bank.admit(adapter)
        with torch.inference_mode():
            cache.reserve("probe", len(tokens))
            logits_MV = self._runner.forward(cache, [SequenceChunk("probe", adapter, 0, tokens)], in_slots=False)
        return logits_MV[0].to(self._base.model.dtype)


def _make_logits_error(sequence: RunningSequence) -> RegistryError:
    where = sequence.request.adapter or "the base"
    what = "an embedding that is not finite" if sequence.is_pooled else f"logits that are not within {LARGEST:g}"
    return RegistryError(f"{where}: gives {what}")


def _make_memory_error(sequence: RunningSequence) -> OverloadedError:
    return OverloadedError(f"there is no memory for a request of {len(sequence.tokens)} tokens now; try again later")
