"""What a trial is judged by: the validation loss, the accuracy, or a function of the user's own.

A function is named `module:function`, as in an entry point. One that Python code hands over and that no other process
can import is named `python:<name>`; the function itself travels beside the config.
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
"""rankloom's own metrics, and where each is best."""
OWN = "metric"
"""What events and reports call the value of the user's metric."""
HANDED_OVER = "python:"
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_own(metric: str) -> bool:
    """Return whether a metric is the user's function."""
    return metric not in BUILT_IN


def best_of(metric: str, mode: Mode | None) -> Mode:
    """Return whether a metric is best at its maximum or its minimum; `mode` is for the user's own."""
    return BUILT_IN.get(metric) or mode or "max"


def check_mode(metric: str, mode: Mode | None) -> None:
    """Raise ConfigError where `mode` contradicts a metric of rankloom's."""
    if mode not in (None, best_of(metric, mode)):
        best = best_of(metric, None)
        raise ConfigError(f"mode: {metric} is best at its {best} (given {mode!r}); leave it out")


def name_of(function: Callable[..., Any]) -> str:
    """Return a function's name in configs: `module:function` where it can be imported by that, else `python:<name>`."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    module = getattr(function, "__module__", None) or "__main__"
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is function:
        return f"{module}:{name}"
    return HANDED_OVER + re.sub(r"\W+", "_", name).strip("_")


def without_own(trial: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's tree that names no code: what others published is no reason to import a module of theirs."""
    settings = trial.get("eval", {})
    if not is_own(settings.get("metric", "loss")):
        return trial
    return trial | {"eval": {key: value for key, value in settings.items() if key not in ("metric", "mode")}}


def _known(metric: str) -> str:
    if is_own(metric) and not _FUNCTION.fullmatch(metric):
        raise ConfigError(
            f"expected {', '.join(BUILT_IN)}, or a function of your own as module:function (given {metric!r})"
        )
    return metric


Metric = Annotated[
    str,
    AfterValidator(_known),
    WithJsonSchema({"anyOf": [{"enum": list(BUILT_IN)}, {"type": "string", "pattern": _FUNCTION.pattern}]}),
]
