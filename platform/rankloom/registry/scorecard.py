"""Scorecard: an adapter's measures, beside the untuned base's. Plain data, no torch.

`rankloom.evals.score` fills it; the registry's record and the reports carry it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Proportion(_Plain):
    """A proportion with its 95 % bootstrap interval, all in 0 to 1."""

    value: float
    low: float
    high: float


class MetricValue(_Plain):
    """The value of a metric of the user's own."""

    name: str
    """As `eval.metric` names it."""
    best: Literal["max", "min"]
    """Whether it is best at its maximum or its minimum."""
    value: float
    low: float | None = None
    """95 % bootstrap interval, where the metric gives a number for each row."""
    high: float | None = None


class Measures(_Plain):
    """Results of one set of weights on the test rows."""

    num_rows: int
    loss: float
    """Mean cross-entropy per trained token, in nats."""
    perplexity: float
    accuracy: Proportion | None = None
    """Proportion of rows whose constrained label is right; classification only."""
    macro_f1: float | None = None
    exact_match: Proportion | None = None
    """Proportion of rows whose free greedy generation equals the completion; not measured for plain text."""
    metric: MetricValue | None = None
    """Value of `eval.metric`, if it is the user's own function."""
    retention_loss: float | None = None
    """Loss on the retention data set, in nats per token."""
    latency_ms: float | None = None
    """Median time of one decode step at batch 1 with a KV cache, in milliseconds per token; an adapter's in PEFT, which
    computes DoRA's norms at each."""
    generated_tokens_per_s: float | None = None
    """Throughput of greedy decoding at batch 8 with a KV cache, in tokens per second."""


class Extraction(_Plain):
    """Fidelity of an adapter extracted from a weight difference to the trained weights."""

    rank: int
    energy: float
    """Share of the difference's squared norm that the adapter keeps, 0 to 1."""
    trained: Measures
    """The trained weights' own measures; the scorecard's `result` is the adapter's."""


class Scorecard(_Plain):
    """Everything measured about one adapter."""

    result: Measures
    base: Measures | None = None
    extraction: Extraction | None = None
    trainable_parameters: int
    adapter_bytes: int
    peak_memory_bytes: int
    """Peak bytes; on CUDA those allocated by torch, on a CPU the resident set of the whole process."""
    steps: int
    train_tokens: int
    train_s: float
    tokens_per_s: float
    device: str


class SuiteScore(_Plain):
    """One metric of a task."""

    task: str
    metric: str
    value: float
    stderr: float | None = None


class SuiteResult(_Plain):
    """Scores of a served adapter on a task of another library. They come after publication, so no record has them."""

    suite: str
    """Such as `lm-eval:gsm8k`."""
    library: str
    """Its name and version."""
    limit: int | None = None
    """Rows of each task at most, as asked."""
    num_rows: int
    at: AwareDatetime
    scores: tuple[SuiteScore, ...]


class MethodCost(_Plain):
    """The cost of a method's training, alone on its device; `rankloom.training.method_cost` measures it."""

    trainable_parameters: int
    """Numbers that train; for a method that trains a part at a time, those of its first step."""
    weight_bytes: int
    """The base as it is quantised, and the adapter."""
    gradient_bytes: int
    """All gradients that exist when the optimiser steps."""
    optimizer_bytes: int
    """The optimiser's state, with projections and importances where a method has them."""
    activation_bytes: int
    """What the forward pass keeps for the backward pass, on the longest batch of the budget."""
    peak_bytes: int
    """The most at one moment of a step. The parts do not add up to it: gradients come as activations go, and
    intermediate results are in it too."""
    tokens_per_s: float
    """Real tokens per second of training, median of a few steps."""
    num_steps: int
    """Steps that were timed."""
    device: str
