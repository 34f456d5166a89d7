"""The route class of the endpoint's application: how a request's body is read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from rankloom.gateway.openai.bodies import SMALL, read
from rankloom.gateway.openai.errors import WireError


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
            if len(body) <= SMALL:
                parsed = read(kind, body)
            else:
                loop = asyncio.get_running_loop()
                parsed = await loop.run_in_executor(request.app.state.reader, read, kind, body)
            return await handle(_ParsedRequest(request, parsed))

        return read_and_handle
