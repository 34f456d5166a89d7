"""Cross-entropy with the head run only where a token is trained on; training and evaluation share it.

A prompt's positions carry no loss, yet a plain forward spends a vocabulary's width of arithmetic and memory on each.
Here a hook in front of the output embedding hands it the hidden states of the trained positions alone.

No attention mask is passed: rows are padded on the right, so that under causal attention no real position sees
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
from rankloom.evals.batches import batches_by_length, device_of, evaluating, unwrapped


@dataclass(frozen=True)
class Loss:
    """Cross-entropy over a set of rows."""

    mean: float
    """Nats a trained token."""
    num_tokens: int
    """Tokens that carry loss."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean) if self.mean < 700 else math.inf  # exp overflows from 710 on


def labelled_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The weighted sum of a batch's token cross-entropy, and the sum of the weights.

    Args:
        model: a causal language model; PEFT-wrapped, DDP-wrapped or sharded by FSDP2 as well.
        batch: padded on the right; on the CPU, so that to find the trained positions nobody waits for the device.

    Returns:
        Two fp32 scalars; the first carries the gradient. Both are 0 where no token has weight.
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
    with _head_sees(model, rows_N, positions_N):
        logits_1NV = model(input_ids=ids_BT, use_cache=False).logits
    losses_N = F.cross_entropy(logits_1NV[0].float(), targets_N, reduction="none")
    return (losses_N * weights_N).sum(), weights_N.sum()


def token_loss(model: nn.Module, rows: Sequence[Row], *, pad_id: int, batch_size: int) -> Loss:
    """The mean loss over all rows; the model is left in the mode it came in.

    Raises:
        DataError: no token of the rows carries loss.
    """
    bare = unwrapped(model)
    total, weight, num_tokens = 0.0, 0.0, 0
    with evaluating(bare):
        for rows_of_batch in batches_by_length(rows, batch_size):
            batch = collate(rows_of_batch, pad_id)
            loss_sum, weight_sum = labelled_loss(bare, batch)
            total += loss_sum.item()
            weight += weight_sum.item()
            num_tokens += int((batch.loss_weights_BT[:, 1:] > 0).sum())
    if not num_tokens:
        raise DataError(f"none of the {len(rows)} rows to evaluate has a token that carries loss; check data.train_on")
    return Loss(total / weight, num_tokens)


@contextmanager
def _head_sees(model: nn.Module, rows_N: Tensor, positions_N: Tensor) -> Iterator[None]:
    """While it lasts, the output embedding is given N hidden states in place of B x T."""
    bare = unwrapped(model)
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
