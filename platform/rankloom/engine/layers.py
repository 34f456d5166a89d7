"""What the layers of a model keep of each token, and which models the engine can serve.

transformers' own calls say it: `read_shape` runs the model with an attention that only notes how it is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from rankloom.engine.attention import ATTENTION, AttentionTerms, get_layer
from rankloom.engine.kv_cache import KvShape, LayerShape
from rankloom.engine.padded_cache import forecast_shape
from rankloom.errors import ModelError

REPLACED_TYPES = {"full_attention", "sliding_attention", "dummy"}
"""Layer types, as transformers' caches name them, that `attention.py` has; a dummy reads an earlier layer's cache."""
SERVED_TYPES = REPLACED_TYPES | {"chunked_attention", "linear_attention", "conv", "hybrid", "hybrid_sliding"}
"""Those that are served, the others as transformers computes them (`padded_cache.py`)."""
PROBES = ((1, 3, 2, 5, 4, 7), (6, 2, 3, 1))
"""Token ids that every vocabulary has."""
NOT_REPLACEABLE = "its attention can't be replaced by the engine's"
NO_CACHE = "its forward does not take transformers' own kind of cache"


def find_obstacle(model: PreTrainedModel) -> str | None:
    """Return why the bank engine can't serve an architecture, as far as it shows without weights; None: it can."""
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if others := sorted({*_list_types(model)} - SERVED_TYPES):
        return f"it has layers of a type ({', '.join(others)}) whose states this engine does not keep"
    if model.device.type == "meta" and not is_replaceable(model):  # with weights it is tried with these
        try:
            forecast_shape(model, model.dtype)
        except RuntimeError as error:  # a ModelError, or it looks at values, which an outline has not
            return str(error) if isinstance(error, ModelError) else None
        except (ValueError, TypeError, AttributeError):
            return NO_CACHE
    return None


def is_replaceable(model: PreTrainedModel) -> bool:
    """Return whether the engine's attention can take the place of the model's own, as far as it shows."""
    return {*_list_types(model)} <= REPLACED_TYPES and model.is_backend_compatible()


def explain_obstacle(model: PreTrainedModel, reason: str) -> str:
    """Return a refusal to serve a model, and what to do instead."""
    return (
        f"{type(model).__name__} can't be served by the engine bank: {reason}; serve it with engine.type=vllm, or "
        f"write base and adapter as one model (rankloom adapters export --format merged) and serve that elsewhere"
    )


@torch.no_grad()
def read_shape(model: PreTrainedModel) -> KvShape:
    """Return what the layers keep of each token; the model's attention must be `ATTENTION`.

    Raises:
        ModelError: a layer does not say what its type needs, so the engine would attend to other tokens.
    """
    device, notes = next(model.parameters()).device, _Notes()
    assert model.config._attn_implementation == ATTENTION
    ids_1N = torch.tensor([PROBES[0]], device=device)
    positions_1N = torch.arange(ids_1N.shape[1], device=device)[None]
    model(input_ids=ids_1N, position_ids=positions_1N, use_cache=False, ragged_layout=notes)
    windows = list(_list_windows(model))
    if [note.index for note in notes.calls] != list(range(len(windows))):
        raise ModelError(NOT_REPLACEABLE)
    for note, (kind, window) in zip(notes.calls, windows, strict=True):
        if kind != "dummy" and note.window != window:
            raise ModelError(f"its layer {note.index} ({kind}) asks for a window of {note.window} tokens, not {window}")
    return KvShape(tuple(_make_layers(notes.calls)), notes.calls[0].key_1HNE.dtype, device)


@dataclass(frozen=True)
class _Call:
    index: int
    key_1HNE: Tensor
    value_1HNE: Tensor
    window: int


@dataclass(frozen=True)
class _Notes:
    """An `AttentionLayout` that notes the calls, and attends to nothing."""

    calls: list[_Call] = field(default_factory=list)

    def attend(
        self, module: nn.Module, query_1HNE: Tensor, key_1HNE: Tensor, value_1HNE: Tensor, terms: AttentionTerms
    ) -> Tensor:
        self.calls.append(_Call(get_layer(module), key_1HNE, value_1HNE, terms.window))
        _, num_heads, num_tokens, _ = query_1HNE.shape
        return query_1HNE.new_zeros(num_tokens, num_heads, value_1HNE.shape[-1])


def _list_types(model: PreTrainedModel) -> list[str]:
    types, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    return types


def _list_windows(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Yield each layer's type and window (0: none), by the config."""
    types, settings = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    for kind, setting in zip(types, settings, strict=True):
        yield kind, setting.get("sliding_window") or 0


def _make_layers(calls: list[_Call]) -> Iterator[LayerShape]:
    for call in calls:
        source = next(other.index for other in calls if other.key_1HNE is call.key_1HNE)
        if source != call.index:
            yield LayerShape(0, 0, 0, source)  # its keys and values are there already
            continue
        _, num_heads, _, key_width = call.key_1HNE.shape
        yield LayerShape(num_heads, key_width, call.value_1HNE.shape[-1], call.index)
