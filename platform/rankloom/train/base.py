"""What a trial asks of its base, whoever trains it: the precision of the arithmetic, and positions for its rows."""

from __future__ import annotations

import torch

from rankloom.config.trial import TrialConfig
from rankloom.data import TaskData
from rankloom.errors import ConfigError
from rankloom.models import Base, auto_dtype, resolve_dtype


def precision_of(trial: TrialConfig, device: torch.device) -> torch.dtype:
    """What the arithmetic runs in; also that of scoring, and of serving where it is auto."""
    return resolve_dtype(trial.compute.precision, auto_dtype(device))


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A run's arithmetic, on weights that may be of another type."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def check_lengths(data: TaskData, base: Base) -> None:
    """A row beyond the model's positions would end the run with an index error, on CUDA with an aborted device."""
    limit = getattr(base.model.config, "max_position_embeddings", None)
    longest = max(int(rows.lengths.max()) for rows in (data.train, data.validation, data.test))
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_length: a row of {longest} tokens is longer than the {limit} positions of {base.id!r}; set "
            f"data.max_length={limit}"
        )
