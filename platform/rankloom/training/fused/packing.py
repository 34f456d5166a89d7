"""Packed rows: all rows of a step one after the other in a single sequence, without padding.

Linear layers, norms and the loss work token by token and see [1, N, D]. Only attention needs to know where rows end:
`packed_attention`, registered with transformers, puts rows of similar lengths into a batch, runs causal SDPA on it and
puts the tokens back. A model whose attention can't be replaced this way gets rows padded on the right, with the same
results; `can_pack` tries it.

Shapes: N tokens of all rows, B rows (of a bucket), T positions, P positions of all buckets, M predicted tokens,
V vocabulary, H heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rankloom.data.render import Row
from rankloom.errors import ModelError

ATTENTION = "rankloom_packed"
SHORT = 64
"""Rows up to this length share a bucket: their attention is so small that padding costs little."""
PROBE_TOLERANCE = 1e-3
"""Largest difference between packed and padded logits in `can_pack`, relative to the largest logit."""
ROW_TYPES = {"full_attention", "sliding_attention"}
"""Layer types in which tokens interact through attention alone."""


@dataclass(frozen=True)
class Example:
    """A row as arrays."""

    ids_T: np.ndarray
    predicting_M: np.ndarray
    """Positions whose next token carries loss."""
    weights_M: np.ndarray
    """The loss weight of that next token."""

    @classmethod
    def of(cls, row: Row) -> Example:
        """Convert a row."""
        weights = np.asarray(row.loss_weights, dtype=np.float32)
        predicting = np.flatnonzero(weights[1:] > 0)
        return cls(np.asarray(row.input_ids, dtype=np.int64), predicting, weights[predicting + 1])

    @property
    def weight(self) -> float:
        return float(self.weights_M.sum())


@dataclass(frozen=True)
class Layout:
    """The buckets for attention: each holds rows of similar lengths with padding, and all of them together are P."""

    buckets: tuple[tuple[int, int], ...]
    """(B, T) of each bucket."""
    tokens_P: Tensor | None
    """Index of the token at each position. Padding repeats the row's own last token, so that one row's NaN can't reach
    another row. None: all rows have one length, and P equals N."""
    positions_N: Tensor | None
    """Each token's position in P; None: P equals N."""


@dataclass(frozen=True)
class Packed:
    """Rows ready for `logits`."""

    input_ids: Tensor
    """[1, N]; for padded rows [B, T]."""
    position_ids: Tensor
    """Positions within each row; shape as `input_ids`."""
    layout: Layout | None
    """None: rows are padded."""
    sizes: list[int]
    """Number of positions of each row, padding included."""
    predicting_M: Tensor
    """Indices of the predicting positions among all flattened positions."""
    targets_M: Tensor
    weights_M: Tensor
    num_predicted: list[int]
    """Number of predicted tokens of each row."""


def pack(examples: Sequence[Example], *, padded_with: int | None, device: torch.device) -> Packed:
    """Pack rows into one sequence, in their order.

    Args:
        padded_with: the token to pad rows with, on the right to the longest row; None: no padding.
    """
    lengths = np.array([len(e.ids_T) for e in examples])
    if padded_with is None:
        starts = np.cumsum(lengths) - lengths
        ids = np.concatenate([e.ids_T for e in examples])[None]
        positions = (np.arange(lengths.sum()) - np.repeat(starts, lengths))[None]
        sizes = lengths
    else:
        width = int(lengths.max())
        starts = np.arange(len(examples)) * width
        ids = np.full((len(examples), width), padded_with, dtype=np.int64)
        for row, example in zip(ids, examples, strict=True):
            row[: len(example.ids_T)] = example.ids_T
        positions = np.broadcast_to(np.arange(width), ids.shape).copy()
        sizes = np.full(len(examples), width)
    predicting = np.concatenate([e.predicting_M + s for e, s in zip(examples, starts, strict=True)])
    return Packed(
        input_ids=_to(ids, device),
        position_ids=_to(positions, device),
        layout=lay_out(lengths, device) if padded_with is None else None,
        sizes=sizes.tolist(),
        predicting_M=_to(predicting, device),
        targets_M=_to(ids.reshape(-1)[predicting + 1], device),
        weights_M=_to(np.concatenate([e.weights_M for e in examples]), device),
        num_predicted=[len(e.predicting_M) for e in examples],
    )


def lay_out(lengths: np.ndarray, device: torch.device) -> Layout:
    """Assign rows to buckets whose lengths are within a factor of two; all short rows share one."""
    if (lengths == lengths[0]).all():
        return Layout(((len(lengths), int(lengths[0])),), None, None)
    starts = np.cumsum(lengths) - lengths
    doublings = np.ceil(np.log2(np.maximum(lengths, SHORT) / SHORT)).astype(int)
    buckets, tokens, positions, offset = [], [], np.empty(lengths.sum(), dtype=np.int64), 0
    for doubling in np.unique(doublings):
        rows = np.flatnonzero(doublings == doubling)
        width = int(lengths[rows].max())
        t = np.arange(width)
        tokens.append((starts[rows, None] + np.minimum(t, lengths[rows, None] - 1)).reshape(-1))
        real = t < lengths[rows, None]
        positions[(starts[rows, None] + t)[real]] = offset + np.flatnonzero(real)
        buckets.append((len(rows), width))
        offset += len(rows) * width
    return Layout(tuple(buckets), _to(np.concatenate(tokens), device), _to(positions, device))


@contextmanager
def packed_attention_on(model: PreTrainedModel, packed: Packed) -> Iterator[None]:
    """Use the attention that `packed` needs inside the context; run the backward pass inside too."""
    before = model.config._attn_implementation
    if packed.layout is not None:
        model.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        if packed.layout is not None:
            model.config._attn_implementation = before


def logits(model: PreTrainedModel, packed: Packed) -> Tensor:
    """Return [M, V], the logits of the predicted tokens alone; call it inside `packed_attention_on`.

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
        extra = {} if packed.layout is None else {"row_layout": packed.layout, "position_ids": packed.position_ids}
        logits_1MV: Tensor = model(input_ids=packed.input_ids, use_cache=False, **extra).logits
    finally:
        handle.remove()
    return logits_1MV[0]


def packed_attention(
    module: nn.Module,
    query_1HNE: Tensor,
    key_1HNE: Tensor,
    value_1HNE: Tensor,
    attention_mask: Tensor | None,
    *,
    row_layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each row; transformers calls it inside `packed_attention_on`.

    Raises:
        ModelError: the layer needs a mask, dropout, a soft cap or sinks.
    """
    if attention_mask is not None or dropout or any(kwargs.get(key) is not None for key in ("softcap", "s_aux")):
        raise ModelError(f"{type(module).__name__} needs an attention that does not support packed rows")
    inputs_PHE = [_unpack(x[0].transpose(0, 1), row_layout) for x in (query_1HNE, key_1HNE, value_1HNE)]
    results, offset = [], 0
    for num_rows, width in row_layout.buckets:
        stop = offset + num_rows * width
        q, k, v = (x[offset:stop].view(num_rows, width, *x.shape[1:]).transpose(1, 2) for x in inputs_PHE)
        mask = _band(width, sliding_window, q.device) if sliding_window and width > sliding_window else None
        result_BTHE, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, is_causal=True)
        results.append(result_BTHE.flatten(0, 1))
        offset = stop
    result_PHE = results[0] if len(results) == 1 else torch.cat(results)
    return _repack(result_PHE, row_layout).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)


def can_pack(model: PreTrainedModel, pad_id: int) -> bool:
    """Return whether packed rows reproduce this model's own logits: checked by its config, then by a forward."""
    config = model.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if model.config._attn_implementation != "sdpa" or not types <= ROW_TYPES:
        return False
    vocabulary, device = model.get_input_embeddings().weight.shape[0], next(model.parameters()).device
    random = np.random.default_rng(0)
    examples = []
    for length in (5, 9, 3):
        ids = random.integers(0, vocabulary, length)
        examples.append(Example(ids, np.arange(length - 1), np.ones(length - 1, dtype=np.float32)))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            expected_MV = logits(model, pack(examples, padded_with=pad_id, device=device))
            packed = pack(examples, padded_with=None, device=device)
            with packed_attention_on(model, packed):
                found_MV = logits(model, packed)
    except (ModelError, TypeError, ValueError, RuntimeError):
        return False  # the architecture does not take these arguments, or uses them differently
    finally:
        for module in training:
            module.training = True
    difference = (found_MV - expected_MV).abs().max() / expected_MV.abs().max()
    tolerance = PROBE_TOLERANCE if expected_MV.dtype == torch.float32 else 0.1
    return bool(difference < tolerance)


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


def _band(width: int, window: int, device: torch.device) -> Tensor:
    """Return [1, 1, T, T], a mask in which each position sees itself and the `window - 1` positions before it."""
    t = torch.arange(width, device=device)
    distance = t[:, None] - t[None]
    return ((distance >= 0) & (distance < window))[None, None]


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
