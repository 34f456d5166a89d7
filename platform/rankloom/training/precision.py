"""Load a trial's base in the right precision, and check that the trial's rows fit it."""

from __future__ import annotations

import torch

from rankloom.config.trial import TrialConfig
from rankloom.data import TaskData
from rankloom.errors import ConfigError, DataError
from rankloom.models import Base, choose_auto_dtype, load_base, resolve_dtype
from rankloom.models.load import DTYPES


def choose_precision(trial: TrialConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of training and scoring, and of serving where that is auto."""
    return resolve_dtype(trial.compute.precision, choose_auto_dtype(device))


def describe_precision(precision: torch.dtype) -> str:
    """Return what a config calls a dtype."""
    return next(name for name, dtype in DTYPES.items() if dtype == precision)


def load_trial_base(trial: TrialConfig, device: torch.device, *, in_fp32: bool = False) -> Base:
    """Load the trial's base.

    Args:
        in_fp32: keep the weights in fp32 and run only the arithmetic in the run's precision; False: load the weights
            in the run's precision.

    Raises:
        ModelError: the base can't be loaded.
    """
    precision = choose_precision(trial, device)
    dtype = torch.float32 if in_fp32 else precision
    return load_base(trial.model, trial.quantization, device=device, dtype=dtype, compute_dtype=precision)


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context for a run's arithmetic; it is off for fp32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def check_lengths(data: TaskData, base: Base) -> None:
    """Refuse rows that the model has no positions or embeddings for; they would abort the device in mid-run.

    Raises:
        ConfigError: a row is longer than the model's positions. DataError: a token is not in the embedding.
    """
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
            f"model embeds only {known} tokens; remove it from the rows or the chat template, or resize the model's "
            f"embedding (resize_token_embeddings) and save the model again"
        )
