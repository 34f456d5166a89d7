"""The middleware of Serve's own HTTP proxies; `rankloom serve` has them import it."""

from __future__ import annotations

from urllib.parse import quote_from_bytes

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send


class PlainRequestIds:
    """A client's X-Request-Id in ASCII: the proxy answers any other with a failure of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope.get("headers", ())
        plain = [(name, encode_plain(value) if name == b"x-request-id" else value) for name, value in headers]
        await self._app({**scope, "headers": plain}, receive, send)


def encode_plain(value: bytes) -> bytes:
    """Return a header's value in ASCII."""
    return value if value.isascii() else quote_from_bytes(value).encode()


def build_middlewares() -> list[Middleware]:
    """Return the proxy's middlewares; RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names this function."""
    return [Middleware(PlainRequestIds)]
