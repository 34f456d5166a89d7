"""Attention for a step's tokens: each token attends to its own sequence in the cache, up to itself.

A step's tokens are one batch [1, N] without padding, so that linear layers see them all at once. transformers calls
`ragged_attention` in place of its own where a model's attention implementation is `ATTENTION`; the step's layout does
it. `SequenceLayout` is the one over a `KvCache`: sequences that decode, one token each, are attended together, bucket
by bucket; longer chunks one by one. `paged_attention.py` has those over a `KvPool`.

Shapes: N tokens, R places of a bucket, H heads, G query heads per key head, T width, E width of a head, D sequences
that decode, M tokens of a bucket, P tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rankloom.banks.served_adapter import ServedAdapter
from rankloom.engine.kv_cache import KvBucket, KvCache
from rankloom.errors import ModelError

ATTENTION = "rankloom_ragged"


@dataclass(frozen=True)
class SequenceChunk:
    """A sequence's next tokens in a forward, and whether the token after them is predicted."""

    id: str
    adapter: ServedAdapter | None
    start: int
    """Tokens of the sequence that are in the cache already."""
    tokens: Sequence[int]
    predicts: bool = True

    @property
    def count(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class _Decoding:
    """The sequences of a bucket that have one new token each. Results at the bucket's other places are dropped."""

    token_R: Tensor | None
    """Each place's token in the step; None: the tokens of the step in their order."""
    place_D: Tensor
    token_D: Tensor
    mask_R11T: Tensor


@dataclass(frozen=True)
class _Part:
    """The tokens of a step that belong to one bucket."""

    bucket: KvBucket
    token_M: Tensor | None
    """Their indices in the step; None: all of the step."""
    place_M: Tensor
    position_M: Tensor
    decoding: _Decoding | None
    chunks: tuple[tuple[int, slice, int, Tensor | None], ...]
    """Place, tokens, stop and mask [1, 1, P, T] (None: causal) of each chunk of several tokens."""


class AttentionLayout(Protocol):
    """The arrangement of a step's tokens that attention needs."""

    def attend(
        self, module: nn.Module, query_1HNE: Tensor, key_1HNE: Tensor, value_1HNE: Tensor, scaling: float | None
    ) -> Tensor:
        """Write the step's keys and values into the cache, and return what attention to it gives [N, H, E].

        Args:
            scaling: None: 1/√E.
        """
        ...


@dataclass(frozen=True)
class SequenceLayout:
    """An `AttentionLayout` over a `KvCache`."""

    parts: tuple[_Part, ...]

    def attend(
        self, module: nn.Module, query_1HNE: Tensor, key_1HNE: Tensor, value_1HNE: Tensor, scaling: float | None
    ) -> Tensor:
        layer = get_layer(module)
        query_NHE, key_NHE, value_NHE = (x[0].transpose(0, 1) for x in (query_1HNE, key_1HNE, value_1HNE))
        result_NHE = query_NHE.new_empty(query_NHE.shape)
        for part in self.parts:
            keys_RHTE, values_RHTE = part.bucket.keys_RHTE[layer], part.bucket.values_RHTE[layer]
            for block, new_NHE in ((keys_RHTE, key_NHE), (values_RHTE, value_NHE)):
                block[part.place_M, :, part.position_M] = new_NHE if part.token_M is None else new_NHE[part.token_M]
            if part.decoding is not None:
                found_RHE = _decode(query_NHE, keys_RHTE, values_RHTE, part.decoding, scaling)
                if part.decoding.token_R is None:
                    result_NHE = found_RHE
                else:
                    result_NHE[part.decoding.token_D] = found_RHE[part.decoding.place_D]
            for place, span, stop, mask in part.chunks:
                query = query_1HNE[:, :, span]
                keys, values = keys_RHTE[place : place + 1, :, :stop], values_RHTE[place : place + 1, :, :stop]
                found_1PHE, _ = sdpa_attention_forward(
                    module, query, keys, values, mask, scaling=scaling, is_causal=mask is None
                )
                result_NHE[span] = found_1PHE[0]
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
        longer = [
            (place, slice(start, start + c.count), c.start + c.count, _make_mask(c, device))
            for c, start, place in members
            if c.count > 1
        ]
        bucket = cache.buckets[width]
        decoding = _arrange_decoding(bucket, single, total, device) if single else None
        whole = len(by_bucket) == 1
        parts.append(
            _Part(bucket, None if whole else tensor(tokens), tensor(places), tensor(positions), decoding, tuple(longer))
        )
    return SequenceLayout(tuple(parts))


def _arrange_decoding(
    bucket: KvBucket, single: list[tuple[SequenceChunk, int, int]], num_tokens: int, device: torch.device
) -> _Decoding:
    num_places = max(place for _, _, place in single) + 1
    token_R, length_R = [0] * num_places, [1] * num_places
    for chunk, start, place in single:
        token_R[place], length_R[place] = start, chunk.start + 1
    aligned = token_R == list(range(num_tokens))
    positions_T = torch.arange(max(length_R), device=device)
    seen_RT = positions_T < torch.tensor(length_R, device=device)[:, None]
    dtype = bucket.keys_RHTE[0].dtype
    mask_RT = torch.zeros(seen_RT.shape, dtype=dtype, device=device).masked_fill_(~seen_RT, -torch.inf)
    return _Decoding(
        None if aligned else torch.tensor(token_R, device=device),
        torch.tensor([place for _, _, place in single], device=device),
        torch.tensor([start for _, start, _ in single], device=device),
        mask_RT[:, None, None],
    )


def _make_mask(chunk: SequenceChunk, device: torch.device) -> Tensor | None:
    if chunk.start == 0:
        return None
    query_P = torch.arange(chunk.start, chunk.start + chunk.count, device=device)
    return (torch.arange(chunk.start + chunk.count, device=device) <= query_P[:, None])[None, None]


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
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by the step's layout."""
    if attention_mask is not None or dropout or any(kwargs.get(key) is not None for key in _UNSUPPORTED):
        raise ModelError(f"{type(module).__name__} asks for an attention that the serving engine does not have")
    return ragged_layout.attend(module, query_1HNE, key_1HNE, value_1HNE, scaling).unsqueeze(0), None


_UNSUPPORTED = ("softcap", "s_aux", "sliding_window", "position_bias")


def _decode(
    query_NHE: Tensor, keys_RHTE: Tensor, values_RHTE: Tensor, decoding: _Decoding, scaling: float | None
) -> Tensor:
    """Return the attention of single tokens [R, H, E].

    The query heads of one key head share one product, so that keys and values are not repeated.
    """
    query_RHE = query_NHE if decoding.token_R is None else query_NHE[decoding.token_R]
    num_places, num_heads, width = query_RHE.shape
    longest = decoding.mask_R11T.shape[-1]
    query_RHGE = query_RHE.reshape(num_places, keys_RHTE.shape[1], -1, width)
    keys, values = keys_RHTE[:num_places, :, :longest], values_RHTE[:num_places, :, :longest]
    found = F.scaled_dot_product_attention(query_RHGE, keys, values, attn_mask=decoding.mask_R11T, scale=scaling)
    return found.reshape(num_places, num_heads, -1)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, ragged_attention)
