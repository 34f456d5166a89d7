"""From rows to batches: padding, and the order in which rows are seen.

The order is a pure function of (seed, epoch), so that a cursor is a few integers and a resumed run sees the batches
that an uninterrupted run would have seen.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rankloom.data.render import Row
from rankloom.errors import DataError

MEGABATCH = 50
"""Batches within which rows are sorted by length: enough to avoid most padding, few enough to stay random."""


@dataclass
class Batch:
    """Rows padded on the right to the length of the longest."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    loss_weights_BT: Tensor
    """0 on padding and on each row's first token, which is never predicted."""

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.input_ids_BT.to(device, non_blocking=True),
            self.attention_mask_BT.to(device, non_blocking=True),
            self.loss_weights_BT.to(device, non_blocking=True),
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are not padding. On a GPU this waits for the device: read it before `to`."""
        return int(self.attention_mask_BT.sum())


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pad rows on the right into one batch."""
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    ids_BT = torch.full(shape, pad_id, dtype=torch.long)
    mask_BT = torch.zeros(shape, dtype=torch.long)
    weights_BT = torch.zeros(shape, dtype=torch.float32)
    for b, row in enumerate(rows):
        length = len(row.input_ids)
        ids_BT[b, :length] = torch.tensor(row.input_ids)
        mask_BT[b, :length] = 1
        weights_BT[b, :length] = torch.tensor(row.loss_weights)
    weights_BT[:, 0] = 0
    return Batch(ids_BT, mask_BT, weights_BT)


class Cursor:
    """An endless sequence of batches of row indices; every row comes exactly once an epoch.

    Args:
        lengths: number of tokens of each row.
        group_by_length: put rows of similar length into one batch; the order of the batches stays random.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, group_by_length: bool) -> None:
        if not len(lengths):
            raise DataError("there are no rows to make batches from")
        self.lengths = np.asarray(lengths)
        self.batch_size, self.seed, self.group_by_length = batch_size, seed, group_by_length
        self._epoch, self._batch = 0, 0  # the batch that `next` returns
        self._batches = self._shuffle(0)

    def next(self) -> list[int]:
        if self._batch == len(self._batches):
            self._epoch, self._batch = self._epoch + 1, 0
            self._batches = self._shuffle(self._epoch)
        self._batch += 1
        indices: list[int] = self._batches[self._batch - 1].tolist()
        return indices

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    @property
    def epoch(self) -> float:
        """Number of epochs seen so far, with the fraction of the current one."""
        return self._epoch + self._batch / self.batches_per_epoch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batch": self._batch, **self._describe_source()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Move to the position that another cursor's `state_dict` recorded.

        Raises:
            DataError: the other cursor has different rows, or a different order.
        """
        for name, value in self._describe_source().items():
            if state[name] != value:
                raise DataError(
                    f"the checkpoint's data cursor has {name}={state[name]}, this run has {value}; resume with the "
                    f"configuration and the data that the checkpoint was written with"
                )
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._batches = self._shuffle(self._epoch)

    def _describe_source(self) -> dict[str, int]:
        return {
            "num_rows": len(self.lengths),
            "num_tokens": int(self.lengths.sum()),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "group_by_length": int(self.group_by_length),
        }

    def _shuffle(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))
        if not self.group_by_length:
            return self._cut(order)
        step = MEGABATCH * self.batch_size
        batches = []
        for start in range(0, len(order), step):
            megabatch = order[start : start + step]
            batches += self._cut(megabatch[np.argsort(self.lengths[megabatch], kind="stable")])
        return [batches[i] for i in random.permutation(len(batches))]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]


def find_longest_batch(cursor: Cursor, num_batches: int) -> tuple[dict[str, int], int]:
    """Return where the longest of a cursor's first batches is, as `load_state_dict` takes it, and its tokens.

    Tokens include padding. The cursor itself stays where it is.
    """
    ahead = Cursor(cursor.lengths, cursor.batch_size, seed=cursor.seed, group_by_length=cursor.group_by_length)
    longest, found = 0, ahead.state_dict()
    for _ in range(num_batches):
        state, rows = ahead.state_dict(), ahead.next()
        if (size := len(rows) * int(cursor.lengths[rows].max())) > longest:
            longest, found = size, state
    return found, longest
