"""The endpoint's own HTTP server, in the ingress's process, for a Ray that was started for it.

Ray Serve's HTTP proxy is another process: it calls the ingress for each request, which calls it back for the body. That
takes as long as all that is ours (benchmarks/serve_overhead.py).
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rankloom.deploy.proxy import encode_plain

KEEP_ALIVE_S = 90
"""As Serve's proxy: longer than clients and load balancers keep an idle connection."""


class HttpServer:
    """uvicorn on this process's event loop."""

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=2048)
        # asyncio does this for most sockets, uvloop for all; otherwise each answer waits 40 ms
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server = _Server(
            uvicorn.Config(
                RequestIds(app), lifespan="off", access_log=False, log_config=None, timeout_keep_alive=KEEP_ALIVE_S
            )
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port, also where 0 was asked for."""
        return int(self._socket.getsockname()[1])

    def start(self) -> None:
        """Accept requests from now on."""
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._socket]))

    async def close(self) -> None:
        """Accept no more requests, and wait for those in flight."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to Ray."""
        yield


class RequestIds:
    """Gives each request an X-Request-Id, the client's own where it sent one, and each response the same."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        id = encode_plain(given) if given else str(uuid.uuid4()).encode()
        others = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id)]
            await send(message)

        await self._app({**scope, "headers": [*others, (b"x-request-id", id)]}, receive, send_with_id)
