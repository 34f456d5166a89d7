"""Requests that the engine's own server reads: what is checked before they get there, and what is sent back.

The body goes there as it came. Checked is what the endpoint itself answers for: the model's name, that each key is one
of the server's, and the limits.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from rankloom.config.serve import LimitsConfig
from rankloom.engine.forward import ForwardJob, ForwardProgress
from rankloom.gateway.openai.errors import WireError
from rankloom.gateway.openai.responses import format_event

_MOST = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""Keys for the most tokens of a completion, in the order in which one of them is set where none is given."""


class ForwardBody(BaseModel):
    """Any object."""

    model_config = ConfigDict(extra="allow")


def make_forward_job(
    path: str, body: Mapping[str, Any], keys: tuple[str, ...], limits: LimitsConfig, context: int, id: str,
    tenant: str | None,
) -> ForwardJob:  # fmt: skip
    """Make a job on the base.

    Args:
        keys: of the path's bodies.
        context: the most tokens of prompt and completion together at the server.

    Raises:
        WireError: a key is unknown, or the body asks for more than the limits.
    """
    for key in body:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(keys)}"
            raise WireError(400, f"{key[:80]}: unknown key; {hint}", param=key[:80])
    model = body.get("model")
    if not isinstance(model, str) or len(model) > 512:
        raise WireError(400, "model: required, but not given.", param="model")
    if limits.context is not None and limits.context < context:
        raise WireError(
            400, f"This endpoint's limits.context={limits.context} holds only for requests that rankloom reads itself; "
            f"its operator can set engine.max_model_len instead."
        )  # fmt: skip
    for key, kind, expected in (("stream", bool, "true or false"), ("stream_options", dict, "an object")):
        if not isinstance(body.get(key), kind | None):
            raise WireError(400, f"{key}: expected {expected}.", param=key)
    if path == "/v1/embeddings" and (count := _count_prompts(body.get("input"))) > limits.embeddings:
        raise WireError(400, f"input: {count} texts in one request, above {limits.embeddings}.", param="input")
    n, num_prompts = _read_count(body, "n") or 1, _count_prompts(body.get("prompt"))
    if n * num_prompts > limits.completions:
        text = f"{n * num_prompts} completions in one request, above {limits.completions}."
        raise WireError(400, text, param="n")
    given = {key: most for key in _MOST if (most := _read_count(body, key)) is not None}
    for key, most in given.items():
        if most > limits.max_tokens:
            raise WireError(400, f"{key} {most} is above {limits.max_tokens}.", param=key)
    generates = [key for key in _MOST if key in keys]
    if generates and not given:
        given = {generates[0]: 16 if path == "/v1/completions" else min(limits.max_tokens, context)}
    most = max(given.values(), default=0)
    return ForwardJob(id, None, path, {**body, **given}, n, num_prompts, most, tenant)


def _read_count(body: Mapping[str, Any], key: str) -> int | None:
    value = body.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise WireError(400, f"{key}: expected a whole number of at least 1.", param=key)
    return value


def _count_prompts(prompt: Any) -> int:
    """Return the number of prompts: a list may be of texts, of lists of tokens, or one prompt's tokens."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


class ForwardReply:
    """A whole answer, as a `gateway.Collector`."""

    def __init__(self) -> None:
        self.body: Mapping[str, Any] = {}

    def add(self, progress: ForwardProgress) -> None:
        self.body = progress.body or self.body


class ForwardStream:
    """A streamed answer, whose events the server has made."""

    def __init__(self, end: bytes) -> None:
        """`end`: what comes after the server's events."""
        self._end = end

    def begin(self) -> Iterator[bytes]:
        yield from ()

    def write(self, progress: ForwardProgress) -> Iterator[bytes]:
        """Yield the bytes of an event."""
        if progress.body is not None:
            head = f"event: {progress.event}\n" if progress.event else ""
            yield f"{head}data: {json.dumps(progress.body, separators=(',', ':'), ensure_ascii=False)}\n\n".encode()

    def end(self) -> Iterator[bytes]:
        yield self._end

    def fail(self, error: WireError) -> Iterator[bytes]:
        yield format_event(error.make_body())
