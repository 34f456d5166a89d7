"""Attention for a step's tokens: each token attends to its own sequence in the cache, up to itself.

A step's tokens are one batch [1, N] without padding, so that linear layers see them all at once. transformers calls
`ragged_attention` in place of its own where a model's attention implementation is `ATTENTION`; the step's layout does
it. `SequenceLayout` is the one over a `KvCache`: sequences that decode, one token each, are attended together, bucket
by bucket; longer chunks one by one. `paged_attention.py` has those over a `KvPool`.

A layer may see a window of tokens alone, cap its scores, or have sinks: `AttentionTerms`. The cache keeps every token
of such layers too; what lies before a window is skipped.

Shapes: N tokens, R places of a bucket, H heads, h key heads, G query heads per key head, T width, E width of a head, D
sequences that decode, M tokens of a bucket, P tokens of a chunk, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rankloom.banks.served_adapter import ServedAdapter
from rankloom.engine.kv_cache import KvBucket, KvCache, KvShape
from rankloom.errors import ModelError
from rankloom.kernels.attention import attend_by_scores

ATTENTION = "rankloom_ragged"


@dataclass(frozen=True)
class SequenceChunk:
    """A sequence's next tokens in a forward, and what is read after them."""

    id: str
    adapter: ServedAdapter | None
    start: int
    """Tokens of the sequence that are in the cache already."""
    tokens: Sequence[int]
    predicts: bool = True
    """Whether the token after them is predicted."""
    scored: bool = False
    """Whether the logits after each of them are read."""
    pooled: bool = False
    """Whether their hidden states are read."""

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def num_kept(self) -> int:
        """Tokens after which there are logits."""
        return self.count if self.scored else int(self.predicts)


@dataclass(frozen=True)
class AttentionTerms:
    """What a layer asks of its attention, beside causality."""

    scale: float
    window: int = 0
    """Tokens that a token sees, itself included; 0: all before it."""
    softcap: float = 0.0
    """Scores are `softcap * tanh(score / softcap)`; 0: not capped."""
    sinks_H: Tensor | None = None
    """Scores that take part in each softmax and have no value."""

    @property
    def is_plain(self) -> bool:
        """Whether torch's own attention has all of it."""
        return self.softcap == 0 and self.sinks_H is None


def _make_mask(position_P: Tensor, span: slice, window: int) -> Tensor:
    """Return which tokens of a span those at these positions see [P, T]."""
    token_T = torch.arange(span.start, span.stop, device=position_P.device)
    seen_PT = token_T <= position_P[:, None]
    return seen_PT & (token_T > position_P[:, None] - window) if window else seen_PT


@dataclass(frozen=True)
class _Decoding:
    """The sequences of a bucket that have one new token each. Results at the bucket's other places are dropped."""

    token_R: Tensor | None
    """Each place's token in the step; None: the tokens of the step in their order."""
    place_D: Tensor
    token_D: Tensor
    length_R: tuple[int, ...]
    dtype: torch.dtype
    _seen: dict[int, tuple[slice, Tensor]] = field(default_factory=dict)

    def find_seen(self, window: int) -> tuple[slice, Tensor]:
        """Return the span of tokens that some place sees, and the mask [R, 1, 1, T] of that span; made once."""
        if window not in self._seen:
            span = slice(max(0, min(self.length_R) - window) if window else 0, max(self.length_R))
            last_R = torch.tensor(self.length_R, device=self.place_D.device) - 1
            seen_RT = _make_mask(last_R, span, window)
            mask_RT = torch.zeros(seen_RT.shape, dtype=self.dtype, device=last_R.device)
            self._seen[window] = span, mask_RT.masked_fill_(~seen_RT, -torch.inf)[:, None, None]
        return self._seen[window]


@dataclass(frozen=True)
class _Longer:
    """A chunk of several tokens."""

    place: int
    tokens: slice
    """In the step."""
    start: int
    device: torch.device
    _seen: dict[int, tuple[slice, Tensor | None]] = field(default_factory=dict)

    def find_seen(self, window: int) -> tuple[slice, Tensor | None]:
        """Return the span of tokens that it sees, and the mask [1, 1, P, T] of that span (None: causal); made once."""
        if window not in self._seen:
            stop = self.start + self.tokens.stop - self.tokens.start
            span = slice(max(0, self.start + 1 - window) if window else 0, stop)
            is_causal = self.start == 0 and not 0 < window < stop
            position_P = torch.arange(self.start, stop, device=self.device)
            self._seen[window] = span, None if is_causal else _make_mask(position_P, span, window)[None, None]
        return self._seen[window]


@dataclass(frozen=True)
class _Part:
    """The tokens of a step that belong to one bucket."""

    bucket: KvBucket
    token_M: Tensor | None
    """Their indices in the step; None: all of the step."""
    place_M: Tensor
    position_M: Tensor
    decoding: _Decoding | None
    chunks: tuple[_Longer, ...]


class AttentionLayout(Protocol):
    """The arrangement of a step's tokens that attention needs."""

    def attend(
        self, module: nn.Module, query_1HNE: Tensor, key_1HNE: Tensor, value_1HNE: Tensor, terms: AttentionTerms
    ) -> Tensor:
        """Write the step's keys and values into the cache, and return what attention to it gives [N, H, E]."""
        ...


@dataclass(frozen=True)
class SequenceLayout:
    """An `AttentionLayout` over a `KvCache`."""

    parts: tuple[_Part, ...]
    shape: KvShape

    def attend(
        self, module: nn.Module, query_1HNE: Tensor, key_1HNE: Tensor, value_1HNE: Tensor, terms: AttentionTerms
    ) -> Tensor:
        layer = get_layer(module)
        source = self.shape.layers[layer].source
        query_NHE, key_NhE, value_NhE = (x[0].transpose(0, 1) for x in (query_1HNE, key_1HNE, value_1HNE))
        result_NHE = query_NHE.new_empty(*query_NHE.shape[:2], value_NhE.shape[2])
        for part in self.parts:
            keys_RhTE, values_RhTE = part.bucket.keys_RHTE[source], part.bucket.values_RHTE[source]
            if source == layer:
                for block, new_NhE in ((keys_RhTE, key_NhE), (values_RhTE, value_NhE)):
                    new_MhE = new_NhE if part.token_M is None else new_NhE[part.token_M]
                    block[part.place_M, :, part.position_M] = new_MhE
            if part.decoding is not None:
                found_RHE = _decode(query_NHE, keys_RhTE, values_RhTE, part.decoding, terms)
                if part.decoding.token_R is None:
                    result_NHE = found_RHE
                else:
                    result_NHE[part.decoding.token_D] = found_RHE[part.decoding.place_D]
            for chunk in part.chunks:
                span, mask = chunk.find_seen(terms.window)
                keys, values = (x[chunk.place : chunk.place + 1, :, span] for x in (keys_RhTE, values_RhTE))
                result_NHE[chunk.tokens] = _attend(module, query_1HNE[:, :, chunk.tokens], keys, values, mask, terms)[0]
        return result_NHE


def lay_out(cache: KvCache, chunks: Sequence[SequenceChunk]) -> SequenceLayout:
    """Arrange a step's tokens for attention.

    Args:
        chunks: in the order of the step's tokens; each sequence has its place in the cache.
    """
    device = cache.shape.device
    starts, total = [], 0
    for chunk in chunks:
        starts.append(total)
        total += chunk.count
    by_bucket: dict[int, list[tuple[SequenceChunk, int, int]]] = {}
    for chunk, start in zip(chunks, starts, strict=True):
        bucket, place = cache.locate(chunk.id)
        by_bucket.setdefault(bucket.width, []).append((chunk, start, place))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)

    parts = []
    for width, members in sorted(by_bucket.items()):
        tokens = [start + i for chunk, start, _ in members for i in range(chunk.count)]
        places = [place for chunk, _, place in members for _ in range(chunk.count)]
        positions = [chunk.start + i for chunk, _, _ in members for i in range(chunk.count)]
        single = [(chunk, start, place) for chunk, start, place in members if chunk.count == 1]
        longer = [_Longer(p, slice(at, at + c.count), c.start, device) for c, at, p in members if c.count > 1]
        bucket = cache.buckets[width]
        decoding = _arrange_decoding(bucket, single, total, device) if single else None
        whole = len(by_bucket) == 1
        parts.append(
            _Part(bucket, None if whole else tensor(tokens), tensor(places), tensor(positions), decoding, tuple(longer))
        )
    return SequenceLayout(tuple(parts), cache.shape)


def _arrange_decoding(
    bucket: KvBucket, single: list[tuple[SequenceChunk, int, int]], num_tokens: int, device: torch.device
) -> _Decoding:
    num_places = max(place for _, _, place in single) + 1
    longest = max(chunk.start + 1 for chunk, _, _ in single)
    token_R, length_R = [0] * num_places, [longest] * num_places
    for chunk, start, place in single:
        token_R[place], length_R[place] = start, chunk.start + 1
    aligned = token_R == list(range(num_tokens))
    return _Decoding(
        None if aligned else torch.tensor(token_R, device=device),
        torch.tensor([place for _, _, place in single], device=device),
        torch.tensor([start for _, start, _ in single], device=device),
        tuple(length_R),
        bucket.keys_RHTE[0].dtype,
    )


def get_layer(module: nn.Module) -> int:
    layer = module.layer_idx
    assert isinstance(layer, int)
    return layer


def ragged_attention(
    module: nn.Module,
    query_1HNE: Tensor,
    key_1HNE: Tensor,
    value_1HNE: Tensor,
    attention_mask: Tensor | None,
    *,
    ragged_layout: AttentionLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by the step's layout.

    Raises:
        ModelError: the layer needs a mask, dropout or a bias.
    """
    if attention_mask is not None or dropout or kwargs.get("position_bias") is not None:
        raise ModelError(f"{type(module).__name__} asks for an attention that the serving engine does not have")
    scale = query_1HNE.shape[-1] ** -0.5 if scaling is None else scaling
    terms = AttentionTerms(scale, sliding_window or 0, softcap or 0.0, s_aux)
    return ragged_layout.attend(module, query_1HNE, key_1HNE, value_1HNE, terms).unsqueeze(0), None


def _attend(
    module: nn.Module,
    query_BHPE: Tensor,
    keys_BhTE: Tensor,
    values_BhTE: Tensor,
    mask: Tensor | None,
    terms: AttentionTerms,
) -> Tensor:
    """Return the attention of chunks [B, P, H, E]."""
    if terms.is_plain:
        found_BPHE: Tensor = sdpa_attention_forward(
            module, query_BHPE, keys_BhTE, values_BhTE, mask, scaling=terms.scale, is_causal=mask is None
        )[0]
        return found_BPHE
    if mask is None:
        num_tokens = query_BHPE.shape[2]
        mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query_BHPE.device).tril()[None, None]
    scored = attend_by_scores(query_BHPE, keys_BhTE, values_BhTE, mask, terms.scale, terms.softcap, terms.sinks_H)
    return scored.transpose(1, 2)


def _decode(
    query_NHE: Tensor, keys_RhTE: Tensor, values_RhTE: Tensor, decoding: _Decoding, terms: AttentionTerms
) -> Tensor:
    """Return the attention of single tokens [R, H, E].

    The query heads of one key head share one product, so that keys and values are not repeated.
    """
    query_RHE = query_NHE if decoding.token_R is None else query_NHE[decoding.token_R]
    num_places, num_heads, _ = query_RHE.shape
    span, mask_R11T = decoding.find_seen(terms.window)
    keys, values = keys_RhTE[:num_places, :, span], values_RhTE[:num_places, :, span]
    if not terms.is_plain:
        query_RH1E, seen_R11T = query_RHE[:, :, None], mask_R11T == 0
        found = attend_by_scores(query_RH1E, keys, values, seen_R11T, terms.scale, terms.softcap, terms.sinks_H)
        return found[:, :, 0]
    query_RhGE = query_RHE.unflatten(1, (keys.shape[1], -1))
    found = F.scaled_dot_product_attention(query_RhGE, keys, values, attn_mask=mask_R11T, scale=terms.scale)
    return found.reshape(num_places, num_heads, -1)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, ragged_attention)
