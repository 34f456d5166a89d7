"""The sizes of a trial's rows: read where the data is at hand and small, else assumed from `data.max_length`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from rankloom.config.model import ModelConfig
from rankloom.config.trial import TrialConfig
from rankloom.errors import DataError, ModelError
from rankloom.models import load_tokenizer, locate_folder
from rankloom.training.schedule import count_steps


@dataclass(frozen=True)
class RowSizes:
    """Tokens of a trial's rows."""

    longest: int
    """Tokens of the longest row."""
    batch_tokens: int
    """Tokens of the longest batch, padding included."""
    predicted_share: float
    """Share of the tokens that carry loss."""
    num_steps: int | None
    """Steps of the budget; None: unknown, since the rows were not counted."""
    step_tokens: float
    """Tokens of a step on average, without padding."""
    are_read: bool
    """Whether the rows were read; False: each counts as `data.max_length` tokens that all carry loss."""


def read_row_sizes(trial: TrialConfig) -> RowSizes:
    """Return the sizes of a trial's training rows, or the largest that they can have."""
    if not _has_tokenizer(trial.model):
        return assume_row_sizes(trial)
    from rankloom.data import READ_BYTES, Cursor, check_sources, find_longest_batch, load_data  # a second, with pandas

    try:
        size = check_sources(trial.data, trial.eval.retention)
        if size is None or size > READ_BYTES:
            return assume_row_sizes(trial)
        data = load_data(trial.data, load_tokenizer(trial.model), retention=trial.eval.retention)
    except (DataError, ModelError):  # a config without its data can be planned too
        return assume_row_sizes(trial)
    optim, lengths = trial.optim, np.asarray(data.train.lengths)
    cursor = Cursor(lengths, optim.batch_size, seed=trial.seed, group_by_length=optim.group_by_length)
    steps = count_steps(trial, cursor.batches_per_epoch)
    train = data.report.splits["train"]
    _, longest = find_longest_batch(cursor, steps)
    return RowSizes(
        longest=int(lengths.max()),
        batch_tokens=longest,
        predicted_share=train.trained_tokens / train.tokens,
        num_steps=steps,
        step_tokens=float(lengths.sum()) / cursor.batches_per_epoch,
        are_read=True,
    )


def read_each_row_sizes(trials: Iterable[TrialConfig]) -> list[RowSizes]:
    """Return the sizes of each trial's rows, as `read_row_sizes` does; trials with equal batches share one reading."""
    known: dict[str, RowSizes] = {}
    sizes = []
    for trial in trials:
        optim = trial.optim
        settings = [trial.model, trial.data, trial.eval.retention, optim.batch_size, optim.group_by_length]
        key = repr([*settings, trial.seed, trial.budget])
        if key not in known:
            known[key] = read_row_sizes(trial)
        sizes.append(known[key])
    return sizes


def _has_tokenizer(model: ModelConfig) -> bool:
    """Return whether the model's folder has one; without its files transformers would build one that knows no text."""
    names = {file.name for file in locate_folder(model, weights=False).iterdir()}
    return not names.isdisjoint(("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"))


def assume_row_sizes(trial: TrialConfig) -> RowSizes:
    """Return the largest sizes that rows can have."""
    longest, rows = trial.data.max_length, trial.optim.batch_size
    return RowSizes(
        longest=longest,
        batch_tokens=rows * longest,
        predicted_share=1.0,
        num_steps=trial.budget.steps,
        step_tokens=float(rows * longest),
        are_read=False,
    )
