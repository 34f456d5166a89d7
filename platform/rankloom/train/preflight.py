"""What a trial would be refused for later, told before anything starts: before Ray, and before the first step.

Looked at are the data, where it is read in a moment, and the model's outline, which has no weights. Hub ids are left to
the workers, which have to fetch them anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from rankloom.config import TrialConfig, dump
from rankloom.config.method import AdapterConfig, LisaConfig
from rankloom.data import check_files, load_data
from rankloom.errors import ConfigError
from rankloom.models import check_experts, decoder_layers, find_target_linears, load_shell, load_tokenizer

READ_BYTES = 50_000_000
"""Size up to which data is read before anything starts; it takes seconds."""


def preflight(trials: Iterable[TrialConfig]) -> list[str]:
    """Refuse what is known to fail; trials that are alike in what is looked at are looked at once.

    Returns:
        What is left out of the training and the user should know of.

    Raises:
        RankloomError: as the run itself would.
    """
    seen: set[str] = set()
    notes: list[str] = []
    for trial in trials:
        tree = dump(trial)
        looked_at = repr([tree[key] for key in ("model", "quantization", "data")])
        size = check_files(trial.data, trial.eval.retention) if looked_at not in seen else None
        if not _is_local(trial.model.id):
            continue
        method = repr([looked_at, trial.method.type, *_details(trial)])
        if method not in seen:
            notes += _check_method(trial)
        if looked_at not in seen:
            tokenizer = load_tokenizer(trial.model)
            if size is not None and size <= READ_BYTES:  # workers on this machine find it read
                load_data(trial.data, tokenizer, retention=trial.eval.retention)
        seen |= {looked_at, method}
    return list(dict.fromkeys(notes))


def _details(trial: TrialConfig) -> list[object]:
    return [getattr(trial.method, key, None) for key in ("target_modules", "experts", "num_layers")]


def _is_local(model: str) -> bool:
    return model.startswith(("builtin:", "/", ".", "~")) or model.endswith(".gguf") or Path(model).exists()


def _check_method(trial: TrialConfig) -> list[str]:
    model = load_shell(trial.model, trial.quantization, dtype=torch.float32)
    method = trial.method
    if isinstance(method, AdapterConfig):
        find_target_linears(model, method.target_modules)
        return check_experts(model, method)
    if isinstance(method, LisaConfig) and method.num_layers > len(decoder_layers(model)):
        raise ConfigError(
            f"method.num_layers: {method.num_layers} is more than the model's {len(decoder_layers(model))} layers"
        )
    return []
