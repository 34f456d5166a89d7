"""Cross-entropy that runs the head only on trained positions; training and evaluation share it.

A prompt's positions carry no loss, yet a plain forward spends a vocabulary's width of arithmetic and memory on each.
A hook before the output embedding passes it only the hidden states of the trained positions.

The model gets no attention mask: rows are padded on the right, so that under causal attention no real position sees
padding, positions count from 0 in every row, and SDPA takes its causal path without a mask.

Shapes: B rows, T positions, N trained positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankloom.data.batching import Batch, collate
from rankloom.data.render import Row
from rankloom.errors import DataError, ModelError
from rankloom.evals.batches import get_device, unwrap, use_evaluation_mode


@dataclass(frozen=True)
class Loss:
    """Cross-entropy over a set of rows."""

    mean: float
    """Nats per trained token."""
    num_tokens: int
    """Number of tokens that carry loss."""

    @property
    def perplexity(self) -> float:
        """exp(mean)."""
        return math.exp(self.mean) if self.mean < 700 else math.inf  # exp overflows from 710 on


def compute_labelled_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of a batch's token cross-entropy, in nats, and the sum of the weights.

    Args:
        model: a causal language model, also PEFT-wrapped, DDP-wrapped or sharded by FSDP2.
        batch: padded on the right; on the CPU, so that finding the trained positions does not wait for the device.

    Returns:
        Two fp32 scalars; the first carries the gradient. Both are 0 if no token has weight.
    """
    losses_N, weights_N, _ = _compute_losses(model, batch)
    return (losses_N * weights_N).sum(), weights_N.sum()


def _compute_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cross-entropy of each trained token, its weight, and the row that it is in."""
    weights_BT = batch.loss_weights_BT[:, 1:]
    rows_N, positions_N = (weights_BT > 0).nonzero(as_tuple=True)  # position t predicts token t + 1
    targets_N = batch.input_ids_BT[rows_N, positions_N + 1]
    weights_N = weights_BT[rows_N, positions_N].float()
    device = get_device(model)
    ids_BT, rows_N, positions_N, targets_N, weights_N = (
        tensor.to(device, non_blocking=True)
        for tensor in (batch.input_ids_BT, rows_N, positions_N, targets_N, weights_N)
    )
    with _apply_head_on_trained(model, rows_N, positions_N):
        logits_1NV = model(input_ids=ids_BT, use_cache=False).logits
    return F.cross_entropy(logits_1NV[0].float(), targets_N, reduction="none"), weights_N, rows_N


@dataclass(frozen=True)
class RowLoss:
    """Cross-entropy of one row."""

    total: float
    """Weighted sum over its trained tokens, in nats."""
    weight: float
    """Sum of their weights."""
    num_tokens: int
    """Number of its tokens that carry loss."""


def compute_row_losses(model: nn.Module, rows: Sequence[Row], *, pad_id: int, batch_size: int) -> list[RowLoss]:
    """Return each row's loss, in the rows' order; each module keeps its mode."""
    bare, found = unwrap(model), [RowLoss(0.0, 0.0, 0)] * len(rows)
    numbers = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))  # the longest first: it fails soonest
    with use_evaluation_mode(bare):
        for start in range(0, len(numbers), batch_size):
            chosen = numbers[start : start + batch_size]
            batch = collate([rows[i] for i in chosen], pad_id)
            losses_N, weights_N, rows_N = _compute_losses(bare, batch)
            sums_B = torch.zeros(len(chosen), device=losses_N.device).index_add_(0, rows_N, losses_N * weights_N)
            weights_BT = batch.loss_weights_BT[:, 1:]
            columns = sums_B.tolist(), weights_BT.sum(1).tolist(), (weights_BT > 0).sum(1).tolist()
            for i, total, weight, count in zip(chosen, *columns, strict=True):
                found[i] = RowLoss(total, weight, count)
    return found


def average_losses(losses: Sequence[RowLoss]) -> Loss:
    """Return the mean loss of the rows' trained tokens.

    Raises:
        DataError: no token of the rows carries loss.
    """
    num_tokens = sum(each.num_tokens for each in losses)
    if not num_tokens:
        raise DataError(
            f"none of the {len(losses)} rows to evaluate has a token that carries loss; check data.train_on"
        )
    return Loss(sum(each.total for each in losses) / sum(each.weight for each in losses), num_tokens)


def compute_token_loss(model: nn.Module, rows: Sequence[Row], *, pad_id: int, batch_size: int) -> Loss:
    """Return the mean loss over all rows; raises DataError as `average_losses` does."""
    return average_losses(compute_row_losses(model, rows, pad_id=pad_id, batch_size=batch_size))


@contextmanager
def _apply_head_on_trained(model: nn.Module, rows_N: Tensor, positions_N: Tensor) -> Iterator[None]:
    """Pass the output embedding N hidden states instead of B x T, inside the context."""
    bare = unwrap(model)
    head = bare.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(bare).__name__} has no output embedding; a causal language model is needed")

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows_N, positions_N].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
