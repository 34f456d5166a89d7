"""Check trials before anything starts: before Ray, and before the first step.

The checks read the data, the model's outline without weights, and its tokenizer. They read and render
only the first rows of large data and of data sets on the hub; the workers check all rows and the weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from rankloom.config import TrialConfig
from rankloom.config.method import AdapterConfig, LisaConfig
from rankloom.data import READ_BYTES, check_heads, check_sources, load_data
from rankloom.evals.own_metric import MetricFunction, load_metric
from rankloom.evals.score import check_metric
from rankloom.models import check_experts, find_decoder_layers, find_target_linears, load_shell, load_tokenizer

HEAD_ROWS = 100
"""Rows of each source that are checked where the data is larger, or of unknown size."""


def preflight(trials: Iterable[TrialConfig], metric: MetricFunction | None = None) -> list[str]:
    """Refuse trials that are certain to fail. Trials with the same data or the same model are checked once.

    Args:
        metric: the user's own metric as a function; None: `eval.metric` names it.

    Returns:
        Notes for the user about what the training leaves out.

    Raises:
        RankloomError: the error that the run itself would raise.
    """
    by_data: dict[str, TrialConfig] = {}
    by_model: dict[str, TrialConfig] = {}
    for trial in trials:
        settings = [getattr(trial.method, name, None) for name in ("target_modules", "experts", "num_layers")]
        load_metric(trial.eval.metric, metric)
        by_data.setdefault(repr([trial.model, trial.data, trial.eval.retention]), trial)
        by_model.setdefault(repr([trial.model, trial.quantization, *settings]), trial)
    sizes = {key: check_sources(trial.data, trial.eval.retention) for key, trial in by_data.items()}
    notes: list[str] = []
    for trial in by_model.values():
        notes += _check_model(trial)
    for key, trial in by_data.items():
        tokenizer, size = load_tokenizer(trial.model), sizes[key]
        is_small = size is not None and size <= READ_BYTES
        retention = trial.eval.retention
        if is_small or not check_heads(trial.data, tokenizer, retention=retention, num_rows=HEAD_ROWS):
            data = load_data(trial.data, tokenizer, retention=retention)  # cached for this machine's workers
            check_metric(trial.eval, tokenizer, data, metric)
    return list(dict.fromkeys(notes))


def _check_model(trial: TrialConfig) -> list[str]:
    model, method = load_shell(trial.model, trial.quantization), trial.method
    if isinstance(method, LisaConfig):
        method.check_depth(len(find_decoder_layers(model)))
    if not isinstance(method, AdapterConfig):
        return []
    find_target_linears(model, method.target_modules)
    return check_experts(model, method)
