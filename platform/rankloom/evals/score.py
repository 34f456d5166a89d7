"""All measures of one set of weights, and the smaller set that training takes every few steps.

Each is a function of a loaded model: call `measure` again with the adapter off to score the untuned base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedTokenizerBase

from rankloom.config.trial import EvalConfig
from rankloom.data import TaskData
from rankloom.data.batching import collate
from rankloom.data.render import Row
from rankloom.data.rows import Rows
from rankloom.errors import ConfigError
from rankloom.evals.batches import batch_by_length, unwrap, use_evaluation_mode
from rankloom.evals.generate import decode_prompts, decode_references, generate_completions
from rankloom.evals.intervals import bootstrap_proportion
from rankloom.evals.labels import LabelTrie, compute_macro_f1, predict_labels
from rankloom.evals.latency import measure_latency
from rankloom.evals.loss import average_losses, compute_labelled_loss, compute_row_losses, compute_token_loss
from rankloom.evals.own_metric import (
    MetricFunction,
    Prediction,
    compute,
    compute_metric_values,
    load_metric,
    summarize_metric,
)
from rankloom.registry.scorecard import Measures, Proportion

CHECKED_ROWS = 32
"""Rows on which the user's own metric is tried before anything starts."""
SEED = 0
"""Seed that chooses the test rows if `eval.max_test_rows` leaves some out; equal for every trial."""


@dataclass(frozen=True)
class RowScore:
    """The result of one test row."""

    loss: float
    """Mean cross-entropy of its trained tokens, in nats; 0 where it has none."""
    weight: float
    """Sum of its trained tokens' weights."""
    reference: str | None = None
    """The row's completion, or its label; None: the rows have no prompts."""
    prediction: str | None = None
    metric: float | None = None
    """Value of `eval.metric`, where that is the user's own and gives one for each row."""


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    config: EvalConfig,
    own: MetricFunction | None = None,
) -> Measures:
    """Score a model on the test rows, as `measure_rows` does."""
    return measure_rows(model, tokenizer, data, config, own)[0]


def measure_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    config: EvalConfig,
    own: MetricFunction | None = None,
) -> tuple[Measures, list[RowScore]]:
    """Score a model on the test rows, and return each row's result too, in the rows' order.

    Classification gets constrained accuracy instead of exact match; plain text, which has no prompts, gets neither.

    Args:
        own: the user's function, if `eval.metric` names one.
    """
    pad_id, batch_size = int(tokenizer.pad_token_id), config.batch_size
    limit = config.max_test_rows
    rows = list(data.test if limit is None else data.test.select(limit, seed=SEED))
    losses = compute_row_losses(model, rows, pad_id=pad_id, batch_size=batch_size)
    scores = [RowScore(each.total / each.weight if each.weight else 0.0, each.weight) for each in losses]
    loss = average_losses(losses)
    accuracy = f1 = exact_match = metric = retention = latency = None
    if has_prompts(data):
        predictions = predict(model, tokenizer, rows, data, batch_size=batch_size)
        truths, texts = [each.reference for each in predictions], [each.prediction for each in predictions]
        scores = [replace(row, reference=t, prediction=p) for row, t, p in zip(scores, truths, texts, strict=True)]
        if data.labels is None:
            exact_match = _measure_equal(truths, texts)
        else:
            accuracy, f1 = _measure_equal(truths, texts), compute_macro_f1(truths, texts)
        if own is not None:
            values = compute_metric_values(own, config, predictions)
            metric = summarize_metric(values, config)
            if isinstance(values, list):
                scores = [replace(row, metric=value) for row, value in zip(scores, values, strict=True)]
    if data.retention is not None:
        kept = data.retention if limit is None else data.retention.select(limit, seed=SEED)
        retention = compute_token_loss(model, kept, pad_id=pad_id, batch_size=batch_size)
    if config.latency:
        latency = measure_latency(model, rows, pad_id=pad_id)
    measures = Measures(
        num_rows=len(rows),
        loss=loss.mean,
        perplexity=loss.perplexity,
        accuracy=accuracy,
        macro_f1=f1,
        exact_match=exact_match,
        metric=metric,
        retention_loss=retention and retention.mean,
        latency_ms=latency and latency.latency_ms,
        generated_tokens_per_s=latency and latency.generated_tokens_per_s,
    )
    return measures, scores


def _check_prompts(data: TaskData) -> None:
    if not has_prompts(data):
        raise ConfigError(
            "eval.metric: a metric of your own needs rows with prompts, which the format text does not have; use loss"
        )


def select_validation_rows(data: TaskData, limit: int | None) -> Rows:
    """Return the validation rows of every evaluation, at most `limit` (`eval.max_rows`)."""
    return data.validation if limit is None else data.validation.select(limit, seed=SEED)


def has_prompts(data: TaskData) -> bool:
    """Return whether the data's rows have prompts, so that there is something to predict."""
    return data.report.format != "text"


def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    data: TaskData,
    *,
    batch_size: int,
    lockstep: bool = False,
) -> list[Prediction]:
    """Return each row with what the model predicts for it: a label in classification, else a generated text."""
    _check_prompts(data)
    if data.labels is None:
        texts = generate_completions(model, tokenizer, rows, batch_size=batch_size, lockstep=lockstep)
        wanted = decode_references(tokenizer, rows)
    else:
        trie, pad_id = LabelTrie(data.labels), int(tokenizer.pad_token_id)
        texts = predict_labels(model, rows, trie, pad_id=pad_id, batch_size=batch_size, lockstep=lockstep)
        wanted = [row.completion for row in rows]
    return [Prediction(*each) for each in zip(decode_prompts(tokenizer, rows), wanted, texts, strict=True)]


def check_metric(
    config: EvalConfig, tokenizer: PreTrainedTokenizerBase, data: TaskData, own: MetricFunction | None = None
) -> None:
    """Check that this data permits the metric, and that the user's own metric works on correct predictions.

    Raises:
        ConfigError: the data has no prompts.
        TrialError: as in `compute`.
    """
    if (function := load_metric(config.metric, own)) is None:
        return
    _check_prompts(data)
    rows = list(data.validation.select(CHECKED_ROWS, seed=SEED))
    wanted = [row.completion for row in rows] if data.labels is not None else decode_references(tokenizer, rows)
    compute(
        function, config, [Prediction(p, w, w) for p, w in zip(decode_prompts(tokenizer, rows), wanted, strict=True)]
    )


def _measure_equal(truths: Sequence[str], predictions: Sequence[str]) -> Proportion:
    return bootstrap_proportion([t == p for t, p in zip(truths, predictions, strict=True)])


@dataclass(frozen=True)
class Validation:
    """One worker's sums; their totals over all workers give the mean loss and the accuracy."""

    loss_sum: float
    weight_sum: float
    correct: int
    """Rows whose constrained label is right; 0 if `eval.metric` is the loss."""
    num_rows: int
    predictions: list[Prediction]
    """Predictions of this worker's rows, in their order; empty if `eval.metric` is the loss."""


def validate(
    model: nn.Module,
    rows: Sequence[Row],
    data: TaskData,
    config: EvalConfig,
    tokenizer: PreTrainedTokenizerBase,
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
    bare, pad_id = unwrap(model), int(tokenizer.pad_token_id)
    num_batches = math.ceil(math.ceil(len(rows) / world) / config.batch_size)
    mine = [rows[i] for i in range(rank, len(rows), world)]
    batches = batch_by_length(mine, config.batch_size)
    repeated = batches[-1] if batches else [rows[0]]
    loss_sum, weight_sum = 0.0, 0.0
    with use_evaluation_mode(bare):
        for i in range(num_batches):
            losses, weights = compute_labelled_loss(bare, collate(batches[i] if i < len(batches) else repeated, pad_id))
            if i < len(batches):
                loss_sum += losses.item()
                weight_sum += weights.item()
    predictions: list[Prediction] = []
    if config.metric != "loss":
        padding = repeated[:1] * (math.ceil(len(rows) / world) - len(mine))
        predictions = predict(
            bare, tokenizer, [*mine, *padding], data, batch_size=config.batch_size, lockstep=world > 1
        )[: len(mine)]
    correct = sum(each.reference == each.prediction for each in predictions) if data.labels is not None else 0
    return Validation(loss_sum, weight_sum, correct, len(mine), predictions)
