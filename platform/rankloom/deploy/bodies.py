"""The route class of the endpoint's application: how a request's body is read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from rankloom.gateway.openai.bodies import SMALL, BodyT, read
from rankloom.gateway.openai.errors import WireError
from rankloom.gateway.openai.forwarding import ForwardBody


class _ParsedRequest(Request):
    """A request whose body was parsed already."""

    def __init__(self, request: Request, body: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._parsed = body

    async def body(self) -> bytes:
        return b"{}"  # not empty, so that FastAPI calls `json`

    async def json(self) -> Any:
        return self._parsed


class BodyRoute(APIRoute):
    """Parses a large body in a thread; FastAPI would do it on the event loop, and report every mistake in it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        kind = self.body_field.field_info.annotation
        assert isinstance(kind, type)

        async def read_and_handle(request: Request) -> Response:
            media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            is_json = media_type.startswith("application/") and media_type.endswith("+json")
            if media_type != "application/json" and not is_json:
                raise WireError(400, "The body is to be JSON: send the header content-type: application/json.")
            try:
                body = await request.body()
            except ClientDisconnect:
                raise WireError(400, "The body ended early.") from None
            forwarding, path = request.app.state.forwarding, request.scope["path"]
            parsed: BaseModel | None = None
            if not forwarding.takes_all(path):
                try:
                    parsed = await _read(request, kind, body)
                except WireError:
                    if not forwarding.takes(path):
                        raise
            if parsed is None:
                return await forwarding.respond(request, await _read(request, ForwardBody, body))
            return await handle(_ParsedRequest(request, parsed))

        return read_and_handle


async def _read(request: Request, kind: type[BodyT], body: bytes) -> BodyT:
    if len(body) <= SMALL:
        return read(kind, body)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(request.app.state.reader, read, kind, body)
