"""Packed rows: all rows of a step one after the other in a single sequence, without padding.

Linear layers, norms and the loss work token by token and see [1, N, D]. Only attention needs to know where rows end;
`attention.py` has it. `arrange` works on the host; its arrays go to the device in one copy (`upload`), and
`Arranged.to_packed` makes `Packed` of them.

Shapes: N tokens of all rows, B rows (of a bucket), T positions, P positions of all buckets, M predicted tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rankloom.data.render import Row
from rankloom.models.staging import upload

Attention = Literal["rows", "buckets", "padded"]
"""How attention sees the rows: as they lie, in padded batches of similar lengths, or padded from the start."""
SHORT = 64
"""Rows up to this length share a bucket: their attention is so small that padding costs little."""


@dataclass(frozen=True)
class Example:
    """A row as arrays."""

    ids_T: np.ndarray
    predicting_M: np.ndarray
    """Positions whose next token carries loss."""
    weights_M: np.ndarray
    """The loss weight of that next token."""

    @classmethod
    def from_row(cls, row: Row) -> Example:
        """Convert a row."""
        weights = np.asarray(row.loss_weights, dtype=np.float32)
        predicting = np.flatnonzero(weights[1:] > 0)
        return cls(np.asarray(row.input_ids, dtype=np.int64), predicting, weights[predicting + 1])

    @property
    def weight(self) -> float:
        return float(self.weights_M.sum())


@dataclass(frozen=True)
class RowLayout:
    """The rows as they lie, for an attention that takes them so."""

    starts_B1: Tensor
    """int32: each row's first token, and the last row's end."""
    longest: int
    """At least the longest row's tokens."""


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
    """Rows ready for a forward."""

    input_ids: Tensor
    """[1, N]; for padded rows [B, T]."""
    position_ids: Tensor
    """Positions within each row; shape as `input_ids`."""
    layout: Layout | RowLayout | None
    """None: rows are padded."""
    sizes: list[int]
    """Number of positions of each row, padding included."""
    predicting_M: Tensor
    """Indices of the predicting positions among all flattened positions."""
    targets_M: Tensor
    weights_M: Tensor
    num_predicted: list[int]
    """Number of predicted tokens of each row."""


@dataclass(frozen=True)
class Arranged:
    """Rows laid out on the host."""

    arrays: dict[str, np.ndarray]
    """What goes to the device."""
    attention: Attention
    sizes: list[int]
    num_predicted: list[int]
    longest: int
    buckets: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number of positions, padding included."""
        return int(self.arrays["input_ids"].size)

    def to_packed(self, tensors: Mapping[str, Tensor]) -> Packed:
        """Return the rows on a device, given their arrays there."""
        layout: Layout | RowLayout | None = None
        if self.attention == "rows":
            layout = RowLayout(tensors["starts_B1"], self.longest)
        elif self.attention == "buckets":
            layout = Layout(self.buckets, tensors.get("tokens_P"), tensors.get("positions_N"))
        return Packed(
            input_ids=tensors["input_ids"],
            position_ids=tensors["position_ids"],
            layout=layout,
            sizes=self.sizes,
            predicting_M=tensors["predicting_M"],
            targets_M=tensors["targets_M"],
            weights_M=tensors["weights_M"],
            num_predicted=self.num_predicted,
        )

    def round_sizes(self, num_slots: int) -> Arranged:
        """Return these rows with sizes on a coarse grid, so that a graph of one size holds for many batches.

        Tokens that are nobody's come first, in rows of their own. Predictions that count for nothing come last.
        """
        assert self.attention == "rows"
        arrays, longest = self.arrays, round_up(self.longest, 1)
        num_tokens, num_rows, num_predicted = self.num_tokens, len(self.sizes), len(arrays["predicting_M"])
        idle = round_up(num_tokens + 1, 8) - num_tokens
        starts = np.arange(0, idle, longest)
        ends = np.full(round_up(num_rows + len(starts), 1) - num_rows - len(starts), num_tokens + idle)
        others = round_up(num_predicted, 4) - num_predicted
        at = np.arange(idle)
        return replace(
            self,
            longest=longest,
            arrays=arrays
            | {
                "input_ids": np.pad(arrays["input_ids"], ((0, 0), (idle, 0))),
                "position_ids": np.append(at % longest, arrays["position_ids"])[None],
                "starts_B1": np.concatenate([starts, arrays["starts_B1"] + idle, ends], dtype=np.int32),
                "predicting_M": np.append(arrays["predicting_M"] + idle, np.resize(at, others)),
                "targets_M": np.pad(arrays["targets_M"], (0, others)),
                "weights_M": np.pad(arrays["weights_M"], (0, others)),
                "slots_N": np.pad(arrays["slots_N"], (idle, 0), constant_values=-1),
                "slots_M": np.pad(arrays["slots_M"], (0, others), constant_values=num_slots),
            },
        )


def round_up(size: int, num_sizes: int) -> int:
    """Return the next size on a grid that has `num_sizes` sizes from a power of two to the next."""
    step = max(1, (1 << size.bit_length() - 1) // num_sizes)
    return -(-size // step) * step


def arrange(examples: Sequence[Example], attention: Attention, *, pad_id: int) -> Arranged:
    """Lay rows out in their order.

    Args:
        pad_id: the token that rows are padded with, on the right to the longest row, where they are padded.
    """
    lengths = np.array([len(e.ids_T) for e in examples])
    if attention == "padded":
        width = int(lengths.max())
        starts = np.arange(len(examples)) * width
        ids = np.full((len(examples), width), pad_id, dtype=np.int64)
        for row, example in zip(ids, examples, strict=True):
            row[: len(example.ids_T)] = example.ids_T
        positions = np.broadcast_to(np.arange(width), ids.shape).copy()
        sizes = np.full(len(examples), width)
    else:
        starts = np.cumsum(lengths) - lengths
        ids = np.concatenate([e.ids_T for e in examples])[None]
        positions = (np.arange(lengths.sum()) - np.repeat(starts, lengths))[None]
        sizes = lengths
    predicting = np.concatenate([e.predicting_M + s for e, s in zip(examples, starts, strict=True)])
    arrays = {
        "input_ids": ids,
        "position_ids": positions,
        "predicting_M": predicting,
        "targets_M": ids.reshape(-1)[predicting + 1],
        "weights_M": np.concatenate([e.weights_M for e in examples]),
    }
    buckets: tuple[tuple[int, int], ...] = ()
    if attention == "rows":
        arrays["starts_B1"] = np.append(starts, lengths.sum()).astype(np.int32)
    elif attention == "buckets":
        buckets, places = lay_out(lengths)
        arrays |= places
    num_predicted = [len(e.predicting_M) for e in examples]
    return Arranged(arrays, attention, sizes.tolist(), num_predicted, int(lengths.max()), buckets)


def pack(examples: Sequence[Example], attention: Attention, *, pad_id: int, device: torch.device) -> Packed:
    """Lay rows out on a device; see `arrange`."""
    arranged = arrange(examples, attention, pad_id=pad_id)
    return arranged.to_packed(upload(arranged.arrays, device))


def lay_out(lengths: np.ndarray) -> tuple[tuple[tuple[int, int], ...], dict[str, np.ndarray]]:
    """Assign rows to buckets whose lengths are within a factor of two; all short rows share one.

    Returns:
        (B, T) of each bucket; and `tokens_P` and `positions_N` of `Layout`, where rows have different lengths.
    """
    if (lengths == lengths[0]).all():
        return ((len(lengths), int(lengths[0])),), {}
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
    return tuple(buckets), {"tokens_P": np.concatenate(tokens), "positions_N": positions}
