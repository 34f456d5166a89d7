"""The metric of a trial: the validation loss, the accuracy, or the user's own function.

A function is named `module:function`, as in an entry point. A function that Python code passes, and that no other
process can import, is named `python:<name>`; the function itself travels beside the config.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, WithJsonSchema

from rankloom.errors import ConfigError

Mode = Literal["max", "min"]
BUILT_IN: dict[str, Mode] = {"loss": "min", "accuracy": "max"}
"""rankloom's own metrics -> whether the highest or the lowest value is best."""
OWN = "metric"
"""Name of the user's metric in events and reports."""
HANDED_OVER = "python:"
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_own(metric: str) -> bool:
    """Return whether a metric is the user's function."""
    return metric not in BUILT_IN


def choose_mode(metric: str, mode: Mode | None) -> Mode:
    """Return whether a metric is best at its maximum or its minimum; `mode` is for the user's own."""
    return BUILT_IN.get(metric) or mode or "max"


def check_mode(metric: str, mode: Mode | None) -> None:
    """Raise ConfigError if `mode` contradicts one of rankloom's metrics."""
    if mode not in (None, choose_mode(metric, mode)):
        best = choose_mode(metric, None)
        raise ConfigError(f"mode: {metric} is best at its {best} (given {mode!r}); leave it out")


def name_function(function: Callable[..., Any]) -> str:
    """Return a function's name in configs: `module:function` if that can be imported, else `python:<name>`."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    module = getattr(function, "__module__", None) or "__main__"
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is function:
        return f"{module}:{name}"
    return HANDED_OVER + re.sub(r"\W+", "_", name).strip("_")


def drop_own(trial: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's tree that names no code, so that a published trial can't make us import its module."""
    settings = trial.get("eval", {})
    if not is_own(settings.get("metric", "loss")):
        return trial
    return trial | {"eval": {key: value for key, value in settings.items() if key not in ("metric", "mode")}}


def _check_name(metric: str) -> str:
    if is_own(metric) and not _FUNCTION.fullmatch(metric):
        raise ConfigError(
            f"expected {', '.join(BUILT_IN)}, or a function of your own as module:function (given {metric!r})"
        )
    return metric


Metric = Annotated[
    str,
    AfterValidator(_check_name),
    WithJsonSchema({"anyOf": [{"enum": list(BUILT_IN)}, {"type": "string", "pattern": _FUNCTION.pattern}]}),
]
