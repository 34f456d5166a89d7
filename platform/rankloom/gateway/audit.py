"""The gateway's lines of log, as JSON: one a request, and one for each decision. Never a prompt or a key."""

from __future__ import annotations

import json
from typing import Any

from rankloom.config.trial import BASE
from rankloom.engine.forward import ForwardJob
from rankloom.errors import AdapterNotFoundError, ConfigError, IncompatibleError, RegistryError, RequestError
from rankloom.gateway.in_flight import InFlightRequest
from rankloom.gateway.metrics import Outcome
from rankloom.gateway.policy import RoutingRequest

REFUSALS = (AdapterNotFoundError, RegistryError, IncompatibleError)
"""Errors of a version itself: another one may still serve the request."""
_CLIENT_ERRORS = (*REFUSALS, ConfigError, RequestError)


def classify(error: BaseException | None) -> Outcome:
    """Return the outcome of a request that ended with this error."""
    if isinstance(error, Exception):
        return "client error" if isinstance(error, _CLIENT_ERRORS) else "server error"
    return "ok" if error is None else "cancelled"


def format_line(event: str, routing: RoutingRequest | None, **facts: Any) -> str:
    """Return a line for the log. Facts that are None are left out."""
    ids = {"id": routing.id, "request_id": routing.trace, "model": routing.model} if routing else {}
    head = {"event": event} | ids
    return json.dumps(head | {name: value for name, value in facts.items() if value is not None})


def describe_end(
    request: InFlightRequest, error: BaseException | None, now: float, first_s: float | None
) -> dict[str, Any]:
    """Return the facts of a request that has ended.

    Args:
        now: in seconds of `time.monotonic`.
        first_s: seconds to its first tokens.
    """
    job = request.job
    return dict(
        adapter=request.target.ref or BASE, traffic=request.traffic,
        outcome=classify(error), key=request.key and request.key.id, route=request.decision.route,
        arm=request.decision.arm, path=job.path if isinstance(job, ForwardJob) else None,
        prompts=job.num_prompts, n=job.n, prompt_tokens=request.prompt_tokens, completion_tokens=request.tokens,
        first_s=_round(first_s), total_s=_round(now - request.begun_at),
        error=type(error).__name__ if error else None,
    )  # fmt: skip


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
