"""ModelRunner: one forward of the base over all tokens of a step, without padding.

transformers' model is used as it is: `ragged_attention` replaces its attention, `ServedBank` adds the adapters.

Shapes: N tokens of all sequences, M sequences that predict, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankloom.banks.served_bank import TokenOrder
from rankloom.engine.attention import ATTENTION, AttentionLayout, SequenceChunk, lay_out
from rankloom.engine.kv_cache import KvCache
from rankloom.engine.layers import NOT_REPLACEABLE, PROBES, explain_obstacle, is_replaceable, read_shape
from rankloom.engine.runner import Runner
from rankloom.errors import ModelError


class ModelRunner(Runner):
    """A `Runner` with the engine's own attention."""

    def __init__(self, model: PreTrainedModel, *, pack: bool = False) -> None:
        """Raises ModelError where this architecture's attention can't be replaced. `pack`: see `ServedBank`."""
        super().__init__(model)
        if not is_replaceable(model):
            raise ModelError(explain_obstacle(model, NOT_REPLACEABLE))
        expected = [_compute_plain_logits(model, tokens) for tokens in PROBES]
        self._as_it_was.callback(setattr, model.config, "_attn_implementation", model.config._attn_implementation)
        model.config._attn_implementation = ATTENTION
        with self._refuse_misfits():
            self.shape = read_shape(model)
        self._open_bank(pack=pack)
        with self._refuse_misfits():
            self._check(expected)

    @torch.inference_mode()
    def forward(self, cache: KvCache, chunks: Sequence[SequenceChunk], *, in_slots: bool = True) -> Tensor:
        route, ordered = self.order(chunks, in_slots=in_slots)
        ids: list[int] = []
        positions: list[int] = []
        last_M, stop = [], 0
        for chunk in ordered:
            ids += chunk.tokens
            positions += range(chunk.start, chunk.start + chunk.count)
            stop += chunk.count
            if chunk.predicts:
                last_M.append(stop - 1)
        layout = lay_out(cache, ordered)
        device = self.shape.device
        logits_MV = self.compute(
            route,
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            layout,
            torch.tensor(last_M, dtype=torch.long, device=device),
        )
        index_of = {chunk.id: m for m, chunk in enumerate(chunk for chunk in ordered if chunk.predicts)}
        order = [index_of[chunk.id] for chunk in chunks if chunk.predicts]
        return logits_MV if order == sorted(order) else logits_MV[order]

    def compute(
        self, route: TokenOrder, ids_N: Tensor, positions_N: Tensor, layout: AttentionLayout, kept_M: Tensor | None
    ) -> Tensor:
        """Return the logits [M, V], in fp32, after the tokens of these indices; None: after all.

        Args:
            route: of the tokens, which are in its order.
        """
        with self.bank.apply_route(route):
            logits_1MV: Tensor = self._model(
                input_ids=ids_N[None],
                position_ids=positions_N[None],
                use_cache=False,
                logits_to_keep=0 if kept_M is None else kept_M,
                ragged_layout=layout,
            ).logits
        return logits_1MV[0].float()


@torch.no_grad()
def _compute_plain_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    ids_BT = torch.tensor([tokens], device=next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits[0, -1].float()
    return logits
