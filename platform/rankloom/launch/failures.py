"""Failures: turn whatever ended a trial into one readable RankloomError."""

from __future__ import annotations

import traceback
from typing import Any, NamedTuple

from rankloom.config import TrialConfig
from rankloom.errors import RankloomError, TrialError


class Failure(NamedTuple):
    """Why a trial failed for good."""

    error: RankloomError
    trace: str | None
    """The stack trace; None where the error's message is enough."""


def to_failure(error: Exception) -> Failure:
    """Return an exception as a readable failure that survives pickling."""
    if isinstance(error, RankloomError):
        return Failure(error, None)
    if type(error).__name__ == "OutOfMemoryError":  # torch's and Ray's; neither need be imported here
        advice = "lower optim.batch_size or raise optim.accumulation, set compute.activation_checkpointing, or quantise"
        return Failure(TrialError(f"out of memory: {_format_line(error)}; {advice}"), None)
    return Failure(TrialError(f"failed: {type(error).__name__}: {_format_line(error)}"), traceback.format_exc())


def to_training_failure(error: Any, trial: TrialConfig) -> Failure:
    """Return Ray Train's error as a failure: the first worker's own error, not the loss of another worker."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    causes = [getattr(failures[rank], "_base_exc", failures[rank]) for rank in sorted(failures)]
    died = [cause for cause in causes if type(cause).__module__.startswith("ray.")]
    known = [cause for cause in causes if isinstance(cause, RankloomError)]
    if known:
        return Failure(known[0], None)
    cause = (died or causes or [getattr(error, "controller_failure", error)])[0]
    text = f"failed: {type(cause).__name__}: {_format_line(cause)}"
    if died:
        text = f"a worker died, and compute.max_failures={trial.compute.max_failures} restart(s) are used up: {text}"
    return Failure(TrialError(f"{text}; --resume continues from the last checkpoint"), str(error))


def _format_line(error: BaseException) -> str:
    text = str(error)
    if "Traceback (most recent call last)" in text:  # Ray Tune's errors hold a trace that ends with the reason
        text = text.strip().splitlines()[-1]
    text = " ".join(text.split())
    return text if len(text) <= 400 else f"{text[:400]} ..."
