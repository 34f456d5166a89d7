"""ModelRunner: one forward of the base over the tokens of many sequences, each on its own adapter.

transformers' model is used as it is: `ragged_attention` replaces its attention, `ServedBank` adds the adapters. Whether
that gives this model's own logits is checked once, before anything is served.

Shapes: N tokens of all sequences, M sequences that predict, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankloom.banks.served_adapter import ServedAdapter
from rankloom.banks.served_bank import AdapterShare, ServedBank, TokenOrder
from rankloom.engine.attention import ATTENTION, AttentionLayout, SequenceChunk, lay_out
from rankloom.engine.kv_cache import KvCache
from rankloom.engine.layers import NOT_REPLACEABLE, PROBES, explain_obstacle, find_obstacle, read_shape
from rankloom.errors import ModelError

PROBE_TOLERANCE = 1e-3
"""Largest difference from the model's own logits, as a share of the largest."""
LOOSE_TOLERANCE = 0.1
"""As much where the model does not compute in fp32."""


class ModelRunner:
    """Owns the model: until `close`, nothing else may run it."""

    def __init__(self, model: PreTrainedModel, *, pack: bool = False) -> None:
        """Raises ModelError where this architecture can't be served. `pack`: see `ServedBank`."""
        self._model = model
        if obstacle := find_obstacle(model):
            raise ModelError(explain_obstacle(model, obstacle))
        expected = [_compute_plain_logits(model, tokens) for tokens in PROBES]
        self._as_it_was = ExitStack()
        self._as_it_was.callback(setattr, model.config, "_attn_implementation", model.config._attn_implementation)
        model.config._attn_implementation = ATTENTION
        with self._refuse_misfits():
            self.shape = read_shape(model)
        self.bank = ServedBank(model, pack=pack)
        self._as_it_was.callback(self.bank.remove)
        with self._refuse_misfits():
            self._check(expected)

    @property
    def tolerance(self) -> float:
        """The largest difference between two ways to these logits, as a share of the largest."""
        return PROBE_TOLERANCE if self.shape.dtype == torch.float32 else LOOSE_TOLERANCE

    def close(self) -> None:
        """Restore the model as it was."""
        self._as_it_was.close()

    @torch.inference_mode()
    def forward(self, cache: KvCache, chunks: Sequence[SequenceChunk], *, in_slots: bool = True) -> Tensor:
        """Return the logits [M, V], in fp32, after each chunk that predicts, in the chunks' order.

        Args:
            chunks: at most one per sequence; each sequence has its place in the cache.
            in_slots: see `ServedBank.route`.
        """
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

    def order(
        self, chunks: Sequence[SequenceChunk], *, in_slots: bool = True
    ) -> tuple[TokenOrder, list[SequenceChunk]]:
        """Return the chunks in the order that the bank wants their tokens in, and its route for them."""
        members: dict[ServedAdapter | None, list[SequenceChunk]] = {}
        for chunk in chunks:
            members.setdefault(chunk.adapter, []).append(chunk)
        shares = [
            AdapterShare(adapter, sum(chunk.count for chunk in own), sum(chunk.predicts for chunk in own))
            for adapter, own in members.items()
        ]
        route = self.bank.route(shares, in_slots=in_slots)
        adapters = list(members)
        return route, [chunk for i in route.order for chunk in members[adapters[i]]]

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

    def _check(self, expected: list[Tensor]) -> None:
        """Compare with the model's own logits: prompts in two chunks, and then token by token, side by side.

        Raises:
            ModelError: they differ.
        """
        cache = KvCache(self.shape, 1 << 20)
        names = [str(i) for i in range(len(PROBES))]
        for name, tokens in zip(names, PROBES, strict=True):
            cache.reserve(name, len(tokens))
            self.forward(cache, [SequenceChunk(name, None, 0, tokens[:2], predicts=True)])
        rest = [tokens[2:-1] for tokens in PROBES]
        self.forward(cache, [SequenceChunk(n, None, 2, r) for n, r in zip(names, rest, strict=True)])
        last = [SequenceChunk(n, None, len(t) - 1, t[-1:]) for n, t in zip(names, PROBES, strict=True)]
        for ours, own in zip(self.forward(cache, last), expected, strict=True):
            if not (ours - own).abs().max() <= self.tolerance * own.abs().max():
                differ = float((ours - own).abs().max())
                raise ModelError(
                    f"its attention is of another kind than the engine's (its logits differ by {differ:.3g})"
                )

    @contextmanager
    def _refuse_misfits(self) -> Iterator[None]:
        """Restore the model, and raise a ModelError, where the architecture does not take what happens inside."""
        try:
            yield
        except (ModelError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            self.close()
            why = str(error) if isinstance(error, ModelError) else NOT_REPLACEABLE
            raise ModelError(explain_obstacle(self._model, why)) from error


@torch.no_grad()
def _compute_plain_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    ids_BT = torch.tensor([tokens], device=next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits[0, -1].float()
    return logits
