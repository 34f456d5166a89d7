"""ModelRunner: one forward of the base over all tokens of a step, without padding.

transformers' model is used as it is: `ragged_attention` replaces its attention, `ServedBank` adds the adapters.

Shapes: N tokens of all sequences, M sequences that predict, K tokens after which logits are needed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankloom.banks.served_bank import TokenOrder
from rankloom.engine.attention import ATTENTION, AttentionLayout, SequenceChunk, lay_out
from rankloom.engine.kv_cache import KvCache
from rankloom.engine.layers import NOT_REPLACEABLE, PROBES, explain_obstacle, is_replaceable, read_shape
from rankloom.engine.runner import PromptOutputs, Runner, StepOutputs
from rankloom.errors import ModelError


@dataclass(frozen=True)
class KeptTokens:
    """The tokens of a step after which logits are needed."""

    indices: list[int]
    """In the step."""
    predicting: dict[str, int]
    """By the id of a chunk that predicts: its last token's place in `indices`."""
    scored: dict[str, slice]
    """By the id of a chunk that is scored: its tokens' places in `indices`."""
    pooled: dict[str, slice]
    """By the id of a chunk that is pooled: its tokens in the step."""

    @staticmethod
    def of_chunks(chunks: Sequence[SequenceChunk]) -> KeptTokens:
        """Return those of the chunks, which are in the step's order."""
        kept, start = KeptTokens([], {}, {}, {}), 0
        for chunk in chunks:
            stop = start + chunk.count
            if chunk.scored:
                kept.scored[chunk.id] = slice(len(kept.indices), len(kept.indices) + chunk.count)
                kept.indices.extend(range(start, stop))
            elif chunk.predicts:
                kept.indices.append(stop - 1)
            if chunk.predicts:
                kept.predicting[chunk.id] = len(kept.indices) - 1
            if chunk.pooled:
                kept.pooled[chunk.id] = slice(start, stop)
            start = stop
        return kept


class ModelRunner(Runner):
    """A `Runner` with the engine's own attention."""

    misfit = NOT_REPLACEABLE

    def __init__(self, model: PreTrainedModel, *, pack: bool = False) -> None:
        """Raises ModelError where this architecture's attention can't be replaced. `pack`: see `ServedBank`."""
        super().__init__(model)
        if not is_replaceable(model):
            raise ModelError(explain_obstacle(model, NOT_REPLACEABLE))
        expected = [_compute_plain_logits(model, tokens) for tokens in PROBES]
        self._open_bank(pack=pack)  # it tries the model's own forward
        self._as_it_was.callback(setattr, model.config, "_attn_implementation", model.config._attn_implementation)
        model.config._attn_implementation = ATTENTION
        with self._refuse_misfits():
            self.shape = read_shape(model)
            self._check(expected)

    @torch.inference_mode()
    def compute_step(self, cache: KvCache, chunks: Sequence[SequenceChunk], *, in_slots: bool = True) -> StepOutputs:
        route, ordered = self.order(chunks, in_slots=in_slots)
        ids: list[int] = []
        positions: list[int] = []
        for chunk in ordered:
            ids += chunk.tokens
            positions += range(chunk.start, chunk.start + chunk.count)
        kept, layout, device = KeptTokens.of_chunks(ordered), lay_out(cache, ordered), self.shape.device
        logits_KV, prompts = self.compute_kept(
            route,
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            layout,
            torch.tensor(kept.indices, dtype=torch.long, device=device),
            kept,
        )
        order = [kept.predicting[chunk.id] for chunk in chunks if chunk.predicts]
        return StepOutputs(logits_KV if order == list(range(len(logits_KV))) else logits_KV[order], prompts)

    def compute_kept(
        self,
        route: TokenOrder,
        ids_N: Tensor,
        positions_N: Tensor,
        layout: AttentionLayout,
        kept_K: Tensor,
        kept: KeptTokens,
    ) -> tuple[Tensor, PromptOutputs]:
        """Return the logits, as `compute`, and what prompts need.

        Args:
            kept: has the numbers in `kept_K`.
        """
        with self._catch_hidden(wanted=bool(kept.pooled)) as found:
            logits_KV = self.compute(route, ids_N, positions_N, layout, kept_K)
        hidden = {id: found[0][0, tokens] for id, tokens in kept.pooled.items()}
        return logits_KV, PromptOutputs({id: logits_KV[places] for id, places in kept.scored.items()}, hidden)

    def compute(
        self, route: TokenOrder, ids_N: Tensor, positions_N: Tensor, layout: AttentionLayout, kept_K: Tensor | None
    ) -> Tensor:
        """Return the logits [K, V], in fp32, after the tokens of these indices; None: after all.

        Args:
            route: of the tokens, which are in its order.
        """
        with self.bank.apply_route(route):
            logits_1KV: Tensor = self._model(
                input_ids=ids_N[None],
                position_ids=positions_N[None],
                use_cache=False,
                logits_to_keep=0 if kept_K is None else kept_K,
                ragged_layout=layout,
            ).logits
        return logits_1KV[0].float()


@torch.no_grad()
def _compute_plain_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    ids_BT = torch.tensor([tokens], device=next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits[0, -1].float()
    return logits
