"""PaddedRunner: forwards of the base as transformers itself makes them, for layers that `ModelRunner` can't have.

The model has its own attention, masks and kind of cache (`padded_cache.py`), which is filled before each forward and
put back after it. All sequences that decode are one batch, padded on the left; the tokens of a prompt are a batch of
their own. Where layers can't continue a sequence by several tokens at once, because they would ignore their states of
before (Mamba, Jamba, RecurrentGemma), those tokens come one by one; where positions count padding (BART), sequences of
one length are a batch. What a model needs is tried out. An adapter with convolutions of its own, or with layers whose
weights are read and not called, has its own batches, for which these take the place of the model's.

Shapes: R sequences of a batch, P tokens that each of them gets, K of them with logits, V vocabulary, D width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankloom.banks.served_adapter import ServedAdapter
from rankloom.engine.attention import SequenceChunk
from rankloom.engine.kv_cache import KvCache, States
from rankloom.engine.layers import NO_CACHE, PROBES
from rankloom.engine.padded_cache import call, fill, make_padding_mask, open_cache, read_kept_shape, store
from rankloom.engine.runner import PROBE_TOLERANCE, PromptOutputs, Runner, StepOutputs
from rankloom.engine.states import StatePlace, find_states
from rankloom.models import find_idle_linears


@dataclass(frozen=True)
class _ChunkOutputs:
    logits_KV: Tensor
    """After its last K tokens: all of a chunk that is scored, else one."""
    hidden_PD: Tensor
    """Empty where nothing of the batch is pooled."""


class PaddedRunner(Runner):
    """A `Runner` over transformers' own forward and cache."""

    misfit = NO_CACHE

    def __init__(self, model: PreTrainedModel, *, pack: bool = False) -> None:
        """Raises ModelError where this architecture can't be served. `pack`: see `ServedBank`."""
        super().__init__(model)
        self._lock = threading.Lock()
        """Held while states are in the model's modules."""
        self._places: list[StatePlace] = []
        self._pads = True
        """Whether sequences of several lengths can be one batch."""
        self._read = {name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)}
        self._read |= find_idle_linears(model)
        """Modules whose weights layers read, or call with tokens side by side: an adapter's own replace them."""
        with self._refuse_misfits():
            expected = [self._compute_plain_logits(tokens) for tokens in PROBES]
            self._open_bank(pack=pack)
            self._find_way(expected)

    @torch.inference_mode()
    def compute_step(self, cache: KvCache, chunks: Sequence[SequenceChunk], *, in_slots: bool = True) -> StepOutputs:
        found: dict[str, list[_ChunkOutputs]] = {chunk.id: [] for chunk in chunks}
        states = dict(cache.states)
        for batch in self._divide(chunks):
            for id, outputs in self._compute(cache, batch, states, in_slots=in_slots).items():
                found[id].append(outputs)
        cache.states = states  # all at once: a step that fails is computed again
        last = [found[chunk.id][-1].logits_KV[-1] for chunk in chunks if chunk.predicts]
        prompts = PromptOutputs(
            {chunk.id: torch.cat([each.logits_KV for each in found[chunk.id]]) for chunk in chunks if chunk.scored},
            {chunk.id: torch.cat([each.hidden_PD for each in found[chunk.id]]) for chunk in chunks if chunk.pooled},
        )
        return StepOutputs(torch.stack(last) if last else torch.empty(0), prompts)

    def _find_way(self, expected: Sequence[Tensor]) -> None:
        """Set which batches are computed: the first kind that gives the model's own logits.

        Raises:
            ModelError: none does.
        """
        ways = [(True, True), (True, False), (False, True), (False, False)]
        if getattr(self._model.config.get_text_config(decoder=True), "attn_temperature_tuning", False):
            ways = ways[2:]  # Llama 4 scales by the length of the cache, which shows beyond 8192 tokens
        errors = {}
        for self._pads, self.continues in ways:
            try:
                errors[self._pads, self.continues] = error = self._measure(expected)
            except RuntimeError:  # such as a shape that does not fit
                continue
            if error <= PROBE_TOLERANCE:
                return
        # a model that is not in fp32 has errors of its own in each
        least = min(errors.values(), default=inf)
        self._pads, self.continues = next((way for way, error in errors.items() if error <= 2 * least), ways[-1])
        self._check(expected)

    def _divide(self, chunks: Sequence[SequenceChunk]) -> Iterator[list[SequenceChunk]]:
        """Yield the batches that compute a step's chunks one after the other."""
        together: dict[ServedAdapter | None, list[SequenceChunk]] = {}
        for chunk in chunks:
            if chunk.start == 0 or (chunk.count > 1 and self.continues):
                yield [chunk]
            else:
                together.setdefault(chunk.adapter if self._replaces(chunk.adapter) else None, []).append(chunk)
        for rows in together.values():
            yield from self._divide_rows(rows)

    def _divide_rows(self, rows: Sequence[SequenceChunk]) -> Iterator[list[SequenceChunk]]:
        for i in range(max((row.count for row in rows), default=0)):
            now = [replace(row, start=row.start + i, tokens=row.tokens[i : i + 1]) for row in rows if i < row.count]
            if self._pads:
                yield now
            else:
                yield from ([row for row in now if row.start == start] for start in sorted({row.start for row in now}))

    def _compute(
        self, kept: KvCache, batch: Sequence[SequenceChunk], states: dict[str, States], *, in_slots: bool
    ) -> dict[str, _ChunkOutputs]:
        """Compute chunks of one length. Returns the outputs of each, by id.

        Args:
            states: of each sequence that has begun, before the batch; changed to those after it.
        """
        route, batch = self.order([replace(chunk, predicts=True) for chunk in batch], in_slots=in_slots)
        device, cache = self.shape.device, open_cache(self._model.config)
        fill(cache, kept, batch)
        ids_RP = torch.tensor([list(chunk.tokens) for chunk in batch], device=device)
        positions_RP = torch.tensor([[*range(c.start, c.start + c.count)] for c in batch], device=device)
        mask = make_padding_mask(batch, device) if self.shape.attends else None
        with self._lock, self.bank.apply_route(route), self._replace_weights(batch[0].adapter):
            for i, place in enumerate(self._places):
                begun = [states[chunk.id][i] for chunk in batch if chunk.start]
                place.write(cache, torch.cat(begun) if begun else None)
            with self._catch_hidden(wanted=any(chunk.pooled for chunk in batch)) as hidden:
                logits_RKV = call(
                    self._model, cache, ids_RP, batch[0].num_kept, position_ids=positions_RP, attention_mask=mask
                )
            after = [place.read(cache).split(1) for place in self._places]
        store(cache, kept, batch)
        states |= {chunk.id: tuple(state[row] for state in after) for row, chunk in enumerate(batch)}
        hidden_RPD = hidden[0] if hidden else torch.empty(len(batch), 0, 0)
        rows = zip(batch, logits_RKV, hidden_RPD, strict=True)
        return {chunk.id: _ChunkOutputs(logits_KV, hidden_PD) for chunk, logits_KV, hidden_PD in rows}

    def _replaces(self, adapter: ServedAdapter | None) -> bool:
        """Return whether an adapter has batches of its own, with its own weights in the model."""
        return adapter is not None and not self._read.isdisjoint(adapter.whole)

    @contextmanager
    def _replace_weights(self, adapter: ServedAdapter | None) -> Iterator[None]:
        """Put what an adapter has in place of modules that are read into the model, inside the context."""
        whole = adapter.whole if adapter else {}
        with ExitStack() as before:
            for name in self._read.intersection(whole):
                module = self._model.get_submodule(name)
                for key, own in whole[name].named_parameters(recurse=False):
                    before.callback(setattr, module, key, getattr(module, key))
                    setattr(module, key, own)
            yield

    @torch.no_grad()
    def _compute_plain_logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the model's own logits [V] after a prompt, and note what its layers keep."""
        cache, device = open_cache(self._model.config), next(self._model.parameters()).device
        logits_11V = call(self._model, cache, torch.tensor([tokens], device=device))
        self._places = list(find_states(self._model, cache))
        self.shape = read_kept_shape(self._model, cache)
        return logits_11V[0, 0]
