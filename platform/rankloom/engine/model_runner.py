"""ModelRunner: one forward of the base over the tokens of many sequences, each on its own adapter.

transformers' model is used as it is: `ragged_attention` replaces its attention, `ServedBank` adds the adapters. Whether
that gives this model's own logits is checked once, before anything is served.

Shapes: N tokens of all sequences, M sequences that predict, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rankloom.banks.served_adapter import ServedAdapter
from rankloom.banks.served_bank import AdapterShare, ServedBank, TokenOrder
from rankloom.engine.attention import ATTENTION, AttentionLayout, SequenceChunk, lay_out
from rankloom.engine.kv_cache import HeadShape, KvCache
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
        self.shape = _read_head_shape(model)
        expected = [_compute_plain_logits(model, tokens) for tokens in PROBES]
        self.bank = ServedBank(model, pack=pack)
        self._attention_before = model.config._attn_implementation
        model.config._attn_implementation = ATTENTION
        self._check(expected)

    @property
    def tolerance(self) -> float:
        """The largest difference between two ways to these logits, as a share of the largest."""
        return PROBE_TOLERANCE if self.shape.dtype == torch.float32 else LOOSE_TOLERANCE

    def close(self) -> None:
        """Restore the model as it was."""
        self.bank.remove()
        self._model.config._attn_implementation = self._attention_before

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
        """Compare with the model's own logits: prompts in two chunks, and then token by token, side by side."""
        cache = KvCache(self.shape, 1 << 20)
        names = [str(i) for i in range(len(PROBES))]
        found: list[Tensor] = []
        try:
            for name, tokens in zip(names, PROBES, strict=True):
                cache.reserve(name, len(tokens))
                self.forward(cache, [SequenceChunk(name, None, 0, tokens[:2], predicts=True)])
            rest = [tokens[2:-1] for tokens in PROBES]
            self.forward(cache, [SequenceChunk(n, None, 2, r) for n, r in zip(names, rest, strict=True)])
            last = [SequenceChunk(n, None, len(t) - 1, t[-1:]) for n, t in zip(names, PROBES, strict=True)]
            found = list(self.forward(cache, last))
        except (ModelError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            self.close()
            why = str(error) if isinstance(error, ModelError) else "its attention can't be replaced by the engine's"
            raise _explain_refusal(self._model, why) from error
        for ours, own in zip(found, expected, strict=True):
            if not (ours - own).abs().max() <= self.tolerance * own.abs().max():
                self.close()
                differ = float((ours - own).abs().max())
                raise _explain_refusal(
                    self._model,
                    f"its attention is of another kind than the engine's (its logits differ by {differ:.3g})",
                )


PROBES = ((1, 3, 2, 5, 4, 7), (6, 2, 3, 1))
"""Token ids that every vocabulary has."""


def _explain_refusal(model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} can't be served by the engine bank: {reason}; serve it with engine.type=vllm, or "
        f"write base and adapter as one model (rankloom adapters export --format merged) and serve that elsewhere"
    )


@torch.no_grad()
def _compute_plain_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    ids_BT = torch.tensor([tokens], device=next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits[0, -1].float()
    return logits


@torch.no_grad()
def _read_head_shape(model: PreTrainedModel) -> HeadShape:
    device = next(model.parameters()).device
    cache = DynamicCache(config=model.config)
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    model(input_ids=torch.tensor([PROBES[0]], device=device), past_key_values=cache, use_cache=True)
    layers = cache.layers
    types |= {"sliding_attention" for at in layers if getattr(at, "is_sliding", False)}
    shapes = {tuple(x.shape) for at in layers if type(at) is DynamicLayer for x in (at.keys, at.values)}
    if types != {"full_attention"} or len(shapes) != 1 or not all(type(at) is DynamicLayer for at in layers):
        raise _explain_refusal(
            model,
            f"its layers ({', '.join(sorted(types))}) don't each keep all keys and values of the same shape, as this "
            f"engine's cache does",
        )
    first = layers[0].keys
    assert first is not None
    return HeadShape(len(layers), first.shape[1], first.shape[3], first.dtype, device)
