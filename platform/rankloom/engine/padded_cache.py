"""transformers' own cache of one batch: filled from what is kept of each sequence, and put back after the forward.

Shapes: R sequences of a batch, T tokens before its own, P tokens of its own, H heads, E width of a head.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, DynamicLayer, get_layer_types_and_kwargs

from rankloom.engine.attention import SequenceChunk
from rankloom.engine.kv_cache import KvCache, KvShape, LayerShape
from rankloom.engine.states import find_states
from rankloom.errors import ModelError

KEEPS_ALL = {
    "sliding_attention": "full_attention",
    "chunked_attention": "full_attention",
    "hybrid_sliding": "hybrid",
}
"""Layer types whose cache forgets tokens, and those that keep them; masks hide what a layer does not see."""


def open_cache(config: PreTrainedConfig) -> Cache:
    """Return an empty cache, whose layers keep all tokens."""
    types, settings = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    kinds = [DYNAMIC_LAYER_TYPE_MAPPING[KEEPS_ALL.get(kind, kind)] for kind in types]
    return Cache(layers=[kind(**setting) for kind, setting in zip(kinds, settings, strict=True)])


def call(model: PreTrainedModel, cache: Cache, ids_RP: Tensor, num_kept: int = 1, **given: Tensor | None) -> Tensor:
    """Return the logits [R, K, V], in fp32, after the last K of a batch's tokens, which follow those in the cache.

    Args:
        num_kept: K.
        given: what else the model gets, if it takes it and it is there.
    """
    accepted = inspect.signature(model.forward).parameters
    name = "past_key_values" if "past_key_values" in accepted else "cache_params"
    given = {key: value for key, value in given.items() if key in accepted and value is not None}
    found = model(input_ids=ids_RP, use_cache=True, logits_to_keep=num_kept, **{name: cache}, **given)
    logits_RKV: Tensor = found.logits
    return logits_RKV[:, -num_kept:].float()


def read_kept_shape(model: PreTrainedModel, cache: Cache) -> KvShape:
    """Return what the layers keep, by the cache of a forward of one sequence.

    Raises:
        ModelError: they keep nothing in it.
    """
    layers = [LayerShape(0, 0, 0, i) for i in range(len(cache.layers))]
    for i, layer in _list_attention(cache):
        if layer.is_initialized:
            layers[i] = LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], i)
    states = [place.read(cache) for place in find_states(model, cache)]
    if not states and not any(layer.num_heads for layer in layers):
        raise ModelError("its layers keep nothing in the cache that transformers gives them")
    return KvShape(tuple(layers), model.dtype, model.device, sum(state.nbytes for state in states))


@torch.no_grad()
def forecast_shape(model: PreTrainedModel, dtype: torch.dtype) -> KvShape:
    """Return what the layers of a model keep, which may be without weights, by a forward on the meta device."""
    outline = copy.deepcopy(model).to(device="meta", dtype=dtype)
    for module in outline.modules():
        if isinstance(module, PreTrainedModel):  # what looks at values has none here
            module.config._experts_implementation, module.config.pad_token_id = "batched_mm", None
    cache = open_cache(outline.config)
    call(outline, cache, torch.zeros(1, 2, dtype=torch.long, device="meta"))
    return read_kept_shape(outline, cache)


def fill(cache: Cache, kept: KvCache, batch: Sequence[SequenceChunk]) -> None:
    """Put the keys and values of the tokens before those of a batch into an empty cache."""
    places = [kept.locate(chunk.id) for chunk in batch]
    for i, layer in _list_attention(cache):
        if any(chunk.start for chunk in batch) and kept.shape.layers[i].num_heads:
            blocks = [(b.keys_RHTE[i][place], b.values_RHTE[i][place]) for b, place in places]
            keys, values = (
                _pad([block[:, : chunk.start] for block, chunk in zip(own, batch, strict=True)])
                for own in zip(*blocks, strict=True)
            )
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values


def store(cache: Cache, kept: KvCache, batch: Sequence[SequenceChunk]) -> None:
    """Put the keys and values of a batch's tokens, the last in the cache, to those of before."""
    places = [kept.locate(chunk.id) for chunk in batch]
    for i, layer in _list_attention(cache):
        for row, (chunk, (bucket, place)) in enumerate(zip(batch, places, strict=True)):
            if kept.shape.layers[i].num_heads:
                span = slice(chunk.start, chunk.start + chunk.count)
                bucket.keys_RHTE[i][place, :, span] = layer.keys[row, :, -chunk.count :]
                bucket.values_RHTE[i][place, :, span] = layer.values[row, :, -chunk.count :]


def _list_attention(cache: Cache) -> Iterator[tuple[int, DynamicLayer]]:
    return ((i, layer) for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicLayer))


def _pad(blocks: Sequence[Tensor]) -> Tensor:
    """Return blocks [H, T, E] as one [R, H, T, E], padded on the left."""
    if len(blocks) == 1:
        return blocks[0][None]
    rows = [block.transpose(0, 1) for block in blocks]
    return pad_sequence(rows, batch_first=True, padding_side="left").transpose(1, 2)


def make_padding_mask(batch: Sequence[SequenceChunk], device: torch.device) -> Tensor | None:
    """Return which tokens of a padded batch are none of padding [R, T + P]; None: all."""
    before_R = torch.tensor([chunk.start for chunk in batch], device=device)
    longest = max(chunk.start for chunk in batch)
    if all(chunk.start == longest for chunk in batch):
        return None
    token_T = torch.arange(longest + batch[0].count, device=device)
    return (token_T >= longest - before_R[:, None]).long()
