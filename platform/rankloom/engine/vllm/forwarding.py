"""Requests that vLLM's own server reads: what it is sent, and what its answers say of tokens. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankloom.engine.forward import ForwardJob, ForwardProgress


def make_forward_body(job: ForwardJob, model: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the body that vLLM gets: the client's, with what this endpoint answers for.

    Args:
        model: what its adapter, or the base, is called there.
        keys: that the path's bodies may have.
    """
    body = {**job.body, "model": model}
    if "request_id" in keys:  # else one client's could be another's
        body["request_id"] = f"resp_{job.id}" if job.path == "/v1/responses" else job.id
    if job.tenant is not None and "cache_salt" in keys:
        body["cache_salt"] = f"{job.tenant}{body.get('cache_salt') or ''}"
    if body.get("stream") and "stream_options" in keys:  # tokens are counted also where the client goes
        body["stream_options"] = {
            **(body.get("stream_options") or {}), "include_usage": True, "continuous_usage_stats": True,
        }  # fmt: skip
    return body


class ForwardReader:
    """Counts an answer's tokens, and takes out of it what the client did not ask for."""

    def __init__(self, job: ForwardJob) -> None:
        asked = job.body.get("stream_options") or {}
        self._model = job.body.get("model")
        self._wants_usage, self._wants_all = asked.get("include_usage"), asked.get("continuous_usage_stats")
        self.streams = bool(job.body.get("stream"))
        self.prompt_tokens = self.cached_tokens = self.tokens = 0
        self._by_choice: dict[int, int] = {}

    def read(self, event: str | None, body: dict[str, Any]) -> ForwardProgress | None:
        """Return an event of a stream, or a whole answer, as the client gets it; None: it gets none.

        Args:
            event: the event's name, where it has one.
        """
        before = self.tokens
        inner = body.get("response")  # in the events of /v1/responses
        for named in (body, inner):
            if isinstance(named, dict) and "model" in named:
                named["model"] = self._model
        usage = body.get("usage") or (inner.get("usage") if isinstance(inner, dict) else None)
        if isinstance(usage, dict):
            self._count(usage, body.get("choices"))
        is_chunk = self.streams and "choices" in body
        if is_chunk and not (self._wants_all or (self._wants_usage and not body["choices"])):
            body.pop("usage", None)
        if is_chunk and not body["choices"] and not self._wants_usage:
            return None
        return self._make(body, self.tokens - before, num_ends=not self.streams, event=event)

    def finish(self) -> ForwardProgress:
        """Return the end of a stream."""
        return self._make(None, 0, num_ends=1, event=None)

    def _count(self, usage: Mapping[str, Any], choices: Any) -> None:
        self.prompt_tokens = usage.get("prompt_tokens") or usage.get("input_tokens") or self.prompt_tokens
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        self.cached_tokens = details.get("cached_tokens") or self.cached_tokens
        generated = usage.get("completion_tokens") or usage.get("output_tokens") or 0
        if self.streams and choices:  # of a chunk's own choice
            self._by_choice[choices[0].get("index", 0)] = generated
            generated = sum(self._by_choice.values())
        self.tokens = max(self.tokens, generated)

    def _make(self, body: Mapping[str, Any] | None, new: int, *, num_ends: int, event: str | None) -> ForwardProgress:
        return ForwardProgress(self.prompt_tokens, new, int(num_ends), self.cached_tokens, self.streams, body, event)


OF_SERVERS = {"kv_transfer_params", "ec_transfer_params"}
"""Keys with which servers of a cluster tell each other where to fetch from; no client's business."""


def list_routes(document: Mapping[str, Any], paths: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return which of the paths a server has, by its OpenAPI document, with the keys of their bodies."""
    found = {}
    for path in paths:
        content = document["paths"].get(path, {}).get("post", {}).get("requestBody", {}).get("content", {})
        if schema := content.get("application/json", {}).get("schema"):
            found[path] = tuple(sorted(_list_keys(schema, document) - OF_SERVERS))
    return found


def _list_keys(schema: Mapping[str, Any], document: Mapping[str, Any]) -> set[str]:
    if "$ref" in schema:
        return _list_keys(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
    keys = set(schema.get("properties", ()))
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())):
        keys |= _list_keys(part, document)
    return keys
