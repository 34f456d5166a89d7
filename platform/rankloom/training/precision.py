"""A trial's base: the precision of its arithmetic, its weights, and positions for the trial's rows."""

from __future__ import annotations

import torch

from rankloom.config.trial import TrialConfig
from rankloom.data import TaskData
from rankloom.errors import ConfigError, DataError
from rankloom.models import Base, auto_dtype, load_base, resolve_dtype


def precision_of(trial: TrialConfig, device: torch.device) -> torch.dtype:
    """What the arithmetic runs in; also that of scoring, and of serving where it is auto."""
    return resolve_dtype(trial.compute.precision, auto_dtype(device))


def load_trial_base(trial: TrialConfig, device: torch.device, *, in_fp32: bool = False) -> Base:
    """Load the trial's base in the run's precision, or in fp32 for arithmetic in that precision."""
    precision = precision_of(trial, device)
    dtype = torch.float32 if in_fp32 else precision
    return load_base(trial.model, trial.quantization, device=device, dtype=dtype, compute_dtype=precision)


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A run's arithmetic, on weights that may be of another type."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def check_lengths(data: TaskData, base: Base) -> None:
    """A row beyond the model's positions or tokens would end the run with an index error, or an aborted device."""
    limit = getattr(base.model.config, "max_position_embeddings", None)
    longest = max(int(rows.lengths.max()) for rows in (data.train, data.validation, data.test))
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_length: a row of {longest} tokens is longer than the {limit} positions of {base.id!r}; set "
            f"data.max_length={limit}"
        )
    known = base.model.get_input_embeddings().weight.shape[0]
    largest = max(rows.largest_token for rows in (data.train, data.validation, data.test))
    if largest >= known:
        token = base.tokenizer.convert_ids_to_tokens(largest)
        raise DataError(
            f"data: the rows hold {token!r}, which the tokenizer of {base.id!r} knows as token {largest}, but the "
            f"model embeds only {known} tokens; take it out of the rows or the chat template, or resize the model's "
            f"embedding (resize_token_embeddings) and save it again"
        )
