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

from torch import Tensor, nn
from torch.nn import functional as F

from rankloom.data.batching import Batch, collate
from rankloom.data.render import Row
from rankloom.errors import DataError, ModelError
from rankloom.evals.batches import batch_by_length, device_of, unwrap, use_evaluation_mode


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
    weights_BT = batch.loss_weights_BT[:, 1:]
    rows_N, positions_N = (weights_BT > 0).nonzero(as_tuple=True)  # position t predicts token t + 1
    targets_N = batch.input_ids_BT[rows_N, positions_N + 1]
    weights_N = weights_BT[rows_N, positions_N].float()
    device = device_of(model)
    ids_BT, rows_N, positions_N, targets_N, weights_N = (
        tensor.to(device, non_blocking=True)
        for tensor in (batch.input_ids_BT, rows_N, positions_N, targets_N, weights_N)
    )
    with _apply_head_on_trained(model, rows_N, positions_N):
        logits_1NV = model(input_ids=ids_BT, use_cache=False).logits
    losses_N = F.cross_entropy(logits_1NV[0].float(), targets_N, reduction="none")
    return (losses_N * weights_N).sum(), weights_N.sum()


def compute_token_loss(model: nn.Module, rows: Sequence[Row], *, pad_id: int, batch_size: int) -> Loss:
    """Return the mean loss over all rows; each module keeps its mode.

    Raises:
        DataError: no token of the rows carries loss.
    """
    bare = unwrap(model)
    total, weight, num_tokens = 0.0, 0.0, 0
    with use_evaluation_mode(bare):
        for rows_of_batch in batch_by_length(rows, batch_size):
            batch = collate(rows_of_batch, pad_id)
            loss_sum, weight_sum = compute_labelled_loss(bare, batch)
            total += loss_sum.item()
            weight += weight_sum.item()
            num_tokens += int((batch.loss_weights_BT[:, 1:] > 0).sum())
    if not num_tokens:
        raise DataError(f"none of the {len(rows)} rows to evaluate has a token that carries loss; check data.train_on")
    return Loss(total / weight, num_tokens)


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
