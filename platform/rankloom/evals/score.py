"""All measures of one set of weights, and the smaller set that training takes every few steps.

Each is a function of a loaded model: call `measure` again with the adapter off to score the untuned base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from rankloom.config.trial import EvalConfig
from rankloom.data import TaskData
from rankloom.data.batching import collate
from rankloom.data.render import Row
from rankloom.errors import ConfigError
from rankloom.evals.batches import batches_by_length, evaluation_mode, unwrap
from rankloom.evals.generate import exact_matches
from rankloom.evals.intervals import bootstrap_proportion
from rankloom.evals.labels import LabelTrie, macro_f1, predict_labels
from rankloom.evals.latency import measure_latency
from rankloom.evals.loss import labelled_loss, token_loss
from rankloom.registry.scorecard import Measures, Proportion

SEED = 0
"""Seed that chooses the test rows if `eval.max_test_rows` leaves some out; equal for every trial."""


def measure(model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: TaskData, config: EvalConfig) -> Measures:
    """Score a model on the test rows.

    Classification gets constrained accuracy instead of exact match; plain text, which has no prompts, gets neither.
    """
    pad_id, batch_size = int(tokenizer.pad_token_id), config.batch_size
    limit = config.max_test_rows
    rows = list(data.test if limit is None else data.test.select(limit, seed=SEED))
    loss = token_loss(model, rows, pad_id=pad_id, batch_size=batch_size)
    accuracy = f1 = exact_match = retention = latency = None
    if data.labels is not None:
        trie = LabelTrie(data.labels)
        predictions = predict_labels(model, rows, trie, pad_id=pad_id, batch_size=batch_size)
        truths = [row.completion for row in rows]
        accuracy = _share_of_equal(truths, predictions)
        f1 = macro_f1(truths, predictions)
    elif data.report.format != "text":
        exact_match = bootstrap_proportion(exact_matches(model, tokenizer, rows, batch_size=batch_size))
    if data.retention is not None:
        kept = data.retention if limit is None else data.retention.select(limit, seed=SEED)
        retention = token_loss(model, kept, pad_id=pad_id, batch_size=batch_size)
    if config.latency:
        latency = measure_latency(model, rows, pad_id=pad_id)
    return Measures(
        num_rows=len(rows),
        loss=loss.mean,
        perplexity=loss.perplexity,
        accuracy=accuracy,
        macro_f1=f1,
        exact_match=exact_match,
        retention_loss=retention and retention.mean,
        latency_ms=latency and latency.latency_ms,
        generated_tokens_per_s=latency and latency.generated_tokens_per_s,
    )


def _share_of_equal(truths: Sequence[str], predictions: Sequence[str]) -> Proportion:
    return bootstrap_proportion([t == p for t, p in zip(truths, predictions, strict=True)])


@dataclass(frozen=True)
class Validation:
    """One worker's sums; their totals over all workers give the mean loss and the accuracy."""

    loss_sum: float
    weight_sum: float
    correct: int
    """Rows whose constrained label is right; 0 if `eval.metric` is not accuracy."""
    num_rows: int


def validate(
    model: nn.Module,
    rows: Sequence[Row],
    data: TaskData,
    config: EvalConfig,
    pad_id: int,
    shard: tuple[int, int],
) -> Validation:
    """Evaluate this worker's share, `rows[rank::world]`.

    All workers run the same number of forwards, because those of a sharded model communicate: a worker with fewer
    batches repeats its last one without counting it.

    Args:
        shard: (rank, world size).
    """
    if config.metric == "accuracy" and data.labels is None:
        raise ConfigError("eval.metric: accuracy needs classification data (text, label); use loss")
    rank, world = shard
    bare = unwrap(model)
    num_batches = math.ceil(math.ceil(len(rows) / world) / config.batch_size)
    mine = [rows[i] for i in range(rank, len(rows), world)]
    batches = batches_by_length(mine, config.batch_size)
    repeated = batches[-1] if batches else [rows[0]]
    trie = LabelTrie(data.labels) if config.metric == "accuracy" and data.labels is not None else None
    loss_sum, weight_sum, correct = 0.0, 0.0, 0
    with evaluation_mode(bare):
        for i in range(num_batches):
            counts = i < len(batches)
            batch_rows = batches[i] if counts else repeated
            losses, weights = labelled_loss(bare, collate(batch_rows, pad_id))
            if counts:
                loss_sum += losses.item()
                weight_sum += weights.item()
            if trie is None:
                continue
            found = predict_labels(
                bare, batch_rows, trie, pad_id=pad_id, batch_size=config.batch_size, lockstep=world > 1
            )
            if counts:
                correct += sum(row.completion == label for row, label in zip(batch_rows, found, strict=True))
    return Validation(loss_sum, weight_sum, correct, len(mine))
