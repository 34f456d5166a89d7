"""Runner: forwards of the base over the tokens of many sequences, each on its own adapter.

There are two. `ModelRunner` (`model_runner.py`) computes all tokens of a step at once, with the engine's own attention.
`PaddedRunner` (`padded_runner.py`) calls the model as transformers does, for layers that the first one can't have. Both
check once, before anything is served, that they give the model's own logits.

Shapes: M sequences that predict, t tokens of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankloom.banks.served_adapter import ServedAdapter
from rankloom.banks.served_bank import AdapterShare, ServedBank, TokenOrder
from rankloom.engine.attention import SequenceChunk
from rankloom.engine.kv_cache import KvCache, KvShape
from rankloom.engine.layers import PROBES, explain_obstacle, find_obstacle
from rankloom.errors import ModelError

PROBE_TOLERANCE = 1e-3
"""Largest difference from the model's own logits, as a share of the largest."""
LOOSE_TOLERANCE = 0.1
"""As much where the model does not compute in fp32."""


@dataclass(frozen=True)
class PromptOutputs:
    """What a step gives for the tokens of prompts, by the ids of their chunks."""

    logits: Mapping[str, Tensor] = field(default_factory=dict)
    """After each token of the chunks that are scored [t, V], in fp32."""
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    """The last layer's, of each token of the chunks that are pooled [t, D], normed."""


@dataclass(frozen=True)
class StepOutputs:
    """What a step gives."""

    logits_MV: Tensor
    """After each chunk that predicts, in the chunks' order, in fp32."""
    prompts: PromptOutputs


class Runner(ABC):
    """Owns the model: until `close`, nothing else may run it."""

    misfit: str
    """What is said of a model that does not take it."""
    shape: KvShape
    bank: ServedBank
    continues = True
    """Whether several tokens can follow others of their sequence at once, as fast as they could begin it."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ModelError where no runner can serve this architecture."""
        self._model = model
        if obstacle := find_obstacle(model):
            raise ModelError(explain_obstacle(model, obstacle))
        self._as_it_was = ExitStack()

    @property
    def tolerance(self) -> float:
        """The largest difference between two ways to these logits, as a share of the largest."""
        return PROBE_TOLERANCE if self.shape.dtype == torch.float32 else LOOSE_TOLERANCE

    def close(self) -> None:
        """Restore the model as it was."""
        self._as_it_was.close()

    @abstractmethod
    def compute_step(self, cache: KvCache, chunks: Sequence[SequenceChunk], *, in_slots: bool = True) -> StepOutputs:
        """Compute chunks.

        Args:
            chunks: at most one per sequence; each sequence has its place in the cache.
            in_slots: see `ServedBank.route`.
        """

    def forward(self, cache: KvCache, chunks: Sequence[SequenceChunk], *, in_slots: bool = True) -> Tensor:
        """Return the logits [M, V], in fp32, after each chunk that predicts. `compute_step` says more."""
        return self.compute_step(cache, chunks, in_slots=in_slots).logits_MV

    def order(
        self, chunks: Sequence[SequenceChunk], *, in_slots: bool = True
    ) -> tuple[TokenOrder, list[SequenceChunk]]:
        """Return the chunks in the order that the bank wants their tokens in, and its route for them."""
        members: dict[ServedAdapter | None, list[SequenceChunk]] = {}
        for chunk in chunks:
            members.setdefault(chunk.adapter, []).append(chunk)
        shares = [
            AdapterShare(adapter, sum(chunk.count for chunk in own), sum(chunk.num_kept for chunk in own))
            for adapter, own in members.items()
        ]
        route = self.bank.route(shares, in_slots=in_slots)
        adapters = list(members)
        return route, [chunk for i in route.order for chunk in members[adapters[i]]]

    @contextmanager
    def _catch_hidden(self, *, wanted: bool) -> Iterator[list[Tensor]]:
        """Yield a list that gets the last layer's hidden states of each forward meanwhile, where they are wanted.

        Another thread may probe an adapter at the same time; its forwards do not count.
        """
        found: list[Tensor] = []
        mine = get_ident()

        def keep(_: nn.Module, __: object, output: Any) -> None:
            if get_ident() == mine:
                found.append(output[0])

        if not wanted:
            yield found
            return
        handle = self._model.get_decoder().register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()

    def _open_bank(self, *, pack: bool) -> None:
        self.bank = ServedBank(self._model, pack=pack)
        self._as_it_was.callback(self.bank.remove)

    def _check(self, expected: Sequence[Tensor]) -> None:
        """Raise a ModelError where this does not give the model's own logits."""
        if not (error := self._measure(expected)) <= self.tolerance:
            raise ModelError(f"its attention is of another kind than the engine's (its logits differ by {error:.1%})")

    def _measure(self, expected: Sequence[Tensor]) -> float:
        """Return the largest difference from the model's own logits after `PROBES`, as a share of the largest.

        They are computed in two chunks, and then token by token, side by side.
        """
        cache = KvCache(self.shape, 1 << 20)
        names = [str(i) for i in range(len(PROBES))]
        for name, tokens in zip(names, PROBES, strict=True):
            cache.reserve(name, len(tokens))
            self.forward(cache, [SequenceChunk(name, None, 0, tokens[:2], predicts=True)])
        rest = [tokens[2:-1] for tokens in PROBES]
        self.forward(cache, [SequenceChunk(n, None, 2, r) for n, r in zip(names, rest, strict=True)])
        last = [SequenceChunk(n, None, len(t) - 1, t[-1:]) for n, t in zip(names, PROBES, strict=True)]
        pairs = zip(self.forward(cache, last), expected, strict=True)
        return float(torch.stack([(ours - own).abs().max() / own.abs().max() for ours, own in pairs]).max())

    @contextmanager
    def _refuse_misfits(self) -> Iterator[None]:
        """Restore the model, and raise a ModelError, where the architecture does not take what happens inside."""
        try:
            yield
        except (ModelError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            self.close()
            why = str(error) if isinstance(error, ModelError) else self.misfit
            raise ModelError(explain_obstacle(self._model, why)) from error
