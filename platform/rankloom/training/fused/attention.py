"""Forwards over packed rows: attention within each row, and the logits of predicted tokens alone.

`packed_attention`, registered with transformers, takes the rows as they lie on a GPU (`kernels.row_attention`);
elsewhere it puts rows of similar lengths into a batch, runs causal SDPA on it and puts the tokens back. A model whose
attention can't be replaced this way gets rows padded on the right, with the same results; `choose_attention` tries it.

Shapes: N tokens of all rows, B rows (of a bucket), T positions, P positions of all buckets, M predicted tokens,
V vocabulary, D width, H heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rankloom.errors import ModelError
from rankloom.kernels import use_on
from rankloom.kernels.row_attention import row_attention
from rankloom.training.fused.packing import Attention, Example, Layout, Packed, RowLayout, pack

ATTENTION = "rankloom_packed"
PROBE_TOLERANCE = 1e-3
"""Largest difference between two ways to compute logits, relative to the largest logit, in fp32."""
ROW_TYPES = {"full_attention", "sliding_attention"}
"""Layer types in which tokens interact through attention alone."""


@contextmanager
def use_packed_attention(model: PreTrainedModel, packed: Packed) -> Iterator[None]:
    """Use the attention that `packed` needs inside the context; run the backward pass inside too."""
    before = model.config._attn_implementation
    if packed.layout is not None:
        model.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        if packed.layout is not None:
            model.config._attn_implementation = before


def compute_logits(model: PreTrainedModel, packed: Packed) -> Tensor:
    """Return [M, V], the logits of the predicted tokens alone; call it inside `use_packed_attention`.

    Raises:
        ModelError: the model has no output embedding, or its attention can't take packed rows.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output embedding; a causal language model is needed")

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flatten(0, 1)[packed.predicting_M].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        logits_1MV: Tensor = model(**_make_arguments(packed)).logits
    finally:
        handle.remove()
    return logits_1MV[0]


def compute_hidden_states(model: PreTrainedModel, packed: Packed) -> Tensor:
    """Return [M, D], what the head reads of the predicted tokens; call it inside `use_packed_attention`."""
    hidden: Tensor = model.base_model(**_make_arguments(packed)).last_hidden_state
    selected: Tensor = _Select.apply(hidden.flatten(0, 1), packed.predicting_M)
    return selected


def _make_arguments(packed: Packed) -> dict[str, Any]:
    extra = {} if packed.layout is None else {"row_layout": packed.layout, "position_ids": packed.position_ids}
    return {"input_ids": packed.input_ids, "use_cache": False, **extra}


def packed_attention(
    module: nn.Module,
    query_1HNE: Tensor,
    key_1HNE: Tensor,
    value_1HNE: Tensor,
    attention_mask: Tensor | None,
    *,
    row_layout: Layout | RowLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each row; transformers calls it inside `use_packed_attention`.

    Raises:
        ModelError: the layer needs a mask, dropout, a soft cap or sinks.
    """
    if attention_mask is not None or dropout or any(kwargs.get(key) is not None for key in ("softcap", "s_aux")):
        raise ModelError(f"{type(module).__name__} needs an attention that does not support packed rows")
    if isinstance(row_layout, RowLayout):
        # not x[0], whose gradient is a copy
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query_1HNE, key_1HNE, value_1HNE))
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        starts_B1, longest = row_layout.starts_B1, row_layout.longest
        return row_attention(q, k, v, starts_B1, longest, scale, sliding_window or 0)[None], None
    inputs_PHE = [_unpack(x[0].transpose(0, 1), row_layout) for x in (query_1HNE, key_1HNE, value_1HNE)]
    results, offset = [], 0
    for num_rows, width in row_layout.buckets:
        stop = offset + num_rows * width
        q, k, v = (x[offset:stop].view(num_rows, width, *x.shape[1:]).transpose(1, 2) for x in inputs_PHE)
        mask = _make_band(width, sliding_window, q.device) if sliding_window and width > sliding_window else None
        result_BTHE, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, is_causal=True)
        results.append(result_BTHE.flatten(0, 1))
        offset = stop
    result_PHE = results[0] if len(results) == 1 else torch.cat(results)
    return _repack(result_PHE, row_layout).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)


def choose_attention(model: PreTrainedModel, pad_id: int) -> Attention:
    """Return the fastest attention that gives the model's own logits: checked by its config, then by a forward."""
    config = model.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if model.config._attn_implementation != "sdpa" or not types <= ROW_TYPES:
        return "padded"
    tried: tuple[Attention, ...] = ("rows", "buckets") if use_on(model.device) else ("buckets",)
    return next((attention for attention in tried if _is_equal(model, attention, pad_id)), "padded")


def _is_equal(model: PreTrainedModel, attention: Attention, pad_id: int) -> bool:
    """Return whether an attention reproduces the logits of padded rows."""
    vocabulary, device = model.get_input_embeddings().weight.shape[0], model.device
    random = np.random.default_rng(0)
    examples = []
    for length in (5, 9, 3):
        ids = random.integers(0, vocabulary, length)
        examples.append(Example(ids, np.arange(length - 1), np.ones(length - 1, dtype=np.float32)))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            expected_MV = compute_logits(model, pack(examples, "padded", pad_id=pad_id, device=device))
            packed = pack(examples, attention, pad_id=pad_id, device=device)
            with use_packed_attention(model, packed):
                found_MV = compute_logits(model, packed)
    except (ModelError, TypeError, ValueError, RuntimeError):
        return False  # the architecture does not take these arguments, or uses them differently
    finally:
        for module in training:
            module.training = True
    return is_close(found_MV, expected_MV)


def is_close(found_MV: Tensor, expected_MV: Tensor) -> bool:
    """Return whether two ways to compute logits agree to rounding."""
    difference = (found_MV - expected_MV).abs().max() / expected_MV.abs().max()
    tolerance = PROBE_TOLERANCE if expected_MV.dtype == torch.float32 else 0.1
    return bool(difference < tolerance)


class _Select(torch.autograd.Function):
    """x_N -> x_M. A token is predicting once, or (in sizes that are rounded) has no gradient: so nothing is summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, predicting_M: Tensor) -> Tensor:
        ctx.num_tokens = len(x)
        ctx.save_for_backward(predicting_M)
        return x.index_select(0, predicting_M)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (predicting_M,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.num_tokens, *gradient.shape[1:])
        return whole.index_copy_(0, predicting_M, gradient), None


class _Unpack(torch.autograd.Function):
    """x_N -> x_P. Attention's results on padding are not read, so their gradients are zero and not summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        assert layout.tokens_P is not None
        ctx.layout = layout
        return x.index_select(0, layout.tokens_P)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.layout.positions_N), None


class _Repack(torch.autograd.Function):
    """x_P -> x_N."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        assert layout.positions_N is not None
        ctx.layout, ctx.num_positions = layout, x.shape[0]
        return x.index_select(0, layout.positions_N)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        padded = gradient.new_zeros(ctx.num_positions, *gradient.shape[1:])
        return padded.index_copy_(0, ctx.layout.positions_N, gradient), None


def _unpack(x_N: Tensor, layout: Layout) -> Tensor:
    return x_N if layout.tokens_P is None else _Unpack.apply(x_N, layout)


def _repack(x_P: Tensor, layout: Layout) -> Tensor:
    return x_P if layout.tokens_P is None else _Repack.apply(x_P, layout)


def _make_band(width: int, window: int, device: torch.device) -> Tensor:
    """Return [1, 1, T, T], a mask in which each position sees itself and the `window - 1` positions before it."""
    t = torch.arange(width, device=device)
    distance = t[:, None] - t[None]
    return ((distance >= 0) & (distance < window))[None, None]
