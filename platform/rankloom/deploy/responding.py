"""What goes back to a client: whole responses, streams of events, errors, and the headers that name a version."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from rankloom.deploy.logs import SERVE
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.in_flight import InFlightRequest
from rankloom.gateway.openai.errors import WireError, to_wire_error
from rankloom.gateway.openai.responses import iter_json
from rankloom.gateway.policy import Target

LARGE = 2**20
"""Bytes of a response that is sent in parts."""

logger = logging.getLogger(SERVE)


def make_headers(target: Target) -> dict[str, str]:
    """Return the headers that name the version which wrote a response."""
    version = {} if target.version is None else {"x-rankloom-version": str(target.version)}
    return {"x-rankloom-adapter": target.adapter or "base"} | version


def respond_json(body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, headers=headers, media_type="application/json")


async def encode_json(value: Any) -> bytes:
    """Return JSON. While a large value is encoded, other requests continue."""
    parts = []
    for part in iter_json(value):
        parts.append(part)
        await asyncio.sleep(0)
    return "".join(parts).encode()


def respond_error(error: WireError) -> JSONResponse:
    return JSONResponse(error.make_body(), error.status, error.make_headers())


def respond_failure(request: Request, error: Exception, gateway: Gateway) -> JSONResponse:
    mapped = to_wire_error(error)
    gateway.metrics.refused.labels(str(mapped.status)).inc()
    if mapped.status == 500:
        _log_failure(request, error)
    return respond_error(mapped)


def _log_failure(request: Request, error: Exception) -> None:
    facts = {"event": "failure", "request_id": request.headers.get("x-request-id"), "path": request.url.path}
    # where it happened, not its message, which may quote a prompt
    where = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    logger.error(json.dumps(facts | {"error": type(error).__name__, "where": where}))


class WholeResponse(Protocol):
    """A response that is not streamed."""

    @property
    def length(self) -> int:
        """Characters of `iter_body`, about."""
        ...

    def iter_body(self) -> Iterator[str]:
        """Yield the body in parts, each of which takes a short time."""
        ...


def respond_whole(response: WholeResponse, headers: dict[str, str]) -> Response:
    """Return a response that is not streamed. A large one is sent in parts, between which other requests continue."""
    if response.length < LARGE:
        return Response("".join(response.iter_body()), headers=headers, media_type="application/json")

    async def parts() -> AsyncIterator[str]:
        for part in response.iter_body():
            yield part

    return StreamingResponse(parts(), headers=headers, media_type="application/json")


class StreamedResponse(Protocol):
    """A response as a stream of events, in parts each of which takes a short time."""

    def begin(self) -> Iterator[bytes]: ...

    def write(self, progress: Any) -> Iterator[bytes]: ...

    def end(self) -> Iterator[bytes]: ...

    def fail(self, error: WireError) -> Iterator[bytes]: ...


async def stream_events(
    in_flight: InFlightRequest, response: StreamedResponse, request: Request
) -> AsyncIterator[bytes]:
    """Yield the events of a stream. A late error is an event too, because the status was sent long before."""
    try:
        for part in response.begin():
            yield part
        async for progress in in_flight:
            for part in response.write(progress):
                yield part
        for part in response.end():
            yield part
    except Exception as error:
        mapped = to_wire_error(error)
        if mapped.status == 500:
            _log_failure(request, error)
        for part in response.fail(mapped):
            yield part


class EventStream(StreamingResponse):
    """Server-sent events. The request ends with the connection, even when nothing was read yet."""

    def __init__(self, in_flight: InFlightRequest, events: AsyncIterator[bytes]) -> None:
        headers = make_headers(in_flight.target) | {"cache-control": "no-cache"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._in_flight.aclose()
