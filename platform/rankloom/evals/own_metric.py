"""A metric of the user's own: a function of a model's predictions on all rows.

    def f1(rows: Sequence[Prediction]) -> float                   one number for all rows
    def overlap(rows: Sequence[Prediction]) -> Sequence[float]    one number per row: their mean, with an interval

One worker of the process that trains or scores calls it. This module does not import torch.
"""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rankloom.config.metric import HANDED_OVER, is_own
from rankloom.config.trial import EvalConfig
from rankloom.errors import ConfigError, TrialError
from rankloom.evals.intervals import bootstrap_mean
from rankloom.registry.scorecard import MetricValue

FIELD = "eval.metric"


@dataclass(frozen=True)
class Prediction:
    """One row, with the model's answer."""

    prompt: str
    """Text of the prompt, without special tokens."""
    reference: str
    """The row's completion; in classification its label."""
    prediction: str
    """The greedily decoded text; in classification the chosen label."""


MetricFunction = Callable[[Sequence[Prediction]], float | Sequence[float]]


def load_metric(metric: str, given: MetricFunction | None = None) -> MetricFunction | None:
    """Return the function that a config names; None for rankloom's own metrics.

    Args:
        given: the function, if Python code passed it.

    Raises:
        ConfigError: it can't be imported, is not callable, or does not take the predictions as its only argument.
    """
    if not is_own(metric):
        return None
    if metric.startswith(HANDED_OVER) and given is None:
        raise ConfigError(
            f"{FIELD}: {metric!r} was a function that Python code handed over; hand it over again with metric=..., or "
            f"name an importable one as module:function"
        )
    function = given if given is not None else _import(metric)
    if not callable(function):
        raise ConfigError(f"{FIELD}: {metric} is a {type(function).__name__}; expected a function")
    try:
        inspect.signature(function).bind([])
    except TypeError as error:
        raise ConfigError(f"{FIELD}: {metric} must take one argument, the list of predictions: {error}") from None
    except ValueError:  # a builtin without a signature
        pass
    return function


def compute(function: MetricFunction, config: EvalConfig, predictions: Sequence[Prediction]) -> MetricValue:
    """Return the metric's value on all rows; raises TrialError as `metric_values` does."""
    return summarize_metric(compute_metric_values(function, config, predictions), config)


def compute_metric_values(
    function: MetricFunction, config: EvalConfig, predictions: Sequence[Prediction]
) -> float | list[float]:
    """Return what the user's function returns for these rows: one number, or one for each.

    Args:
        config: its name, and whether its best value is the highest or the lowest.

    Raises:
        TrialError: the function fails, or returns neither a finite number nor one for each row.
    """
    metric = config.metric
    try:
        found: Any = function(predictions)
    except Exception as error:  # the user's code may raise anything
        raise TrialError(f"{FIELD}: {metric} failed: {type(error).__name__}: {error}") from error
    values = [found] if _is_number(found) else list(found) if _is_sequence(found) else []
    if not values or not all(map(_is_number, values)) or (found is not values[0] and len(values) != len(predictions)):
        given = f"{type(found).__name__} of {len(values)}" if values else f"{found!r}"
        raise TrialError(
            f"{FIELD}: {metric} returned {given:.200}; expected a number, or a list of {len(predictions)} numbers, one "
            f"for each row"
        )
    if not all(math.isfinite(value) for value in values):
        raise TrialError(f"{FIELD}: {metric} returned a value that is not finite; return a number for any predictions")
    return float(found) if _is_number(found) else [float(value) for value in values]


def summarize_metric(values: float | list[float], config: EvalConfig) -> MetricValue:
    """Return the metric's value on all rows, with an interval where there is a value for each row."""
    if isinstance(values, float):
        return MetricValue(name=config.metric, best=config.best, value=values)
    value, low, high = bootstrap_mean(values)
    return MetricValue(name=config.metric, best=config.best, value=value, low=low, high=high)


def _import(metric: str) -> Any:
    module, _, name = metric.partition(":")
    if os.getcwd() not in sys.path:  # a console script's path lacks it, but a metric is often next to its config
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(
            f"{FIELD}: {metric!r} can't be imported: {type(error).__name__}: {error}; give module:function, with the "
            f"module in the working directory or installed"
        ) from None
    return found


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, numbers.Real) or (getattr(value, "shape", None) == () and hasattr(value, "item"))


def _is_sequence(value: Any) -> bool:
    return not isinstance(value, (str, bytes, dict)) and hasattr(value, "__len__") and hasattr(value, "__iter__")
