"""ASGI middleware: authenticates the caller and limits the body. It refuses a request before its body is read."""

from __future__ import annotations

import base64
import ipaddress
import re
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rankloom.config.serve import ServeConfig
from rankloom.errors import ConfigError
from rankloom.gateway.keys import Key, KeyFile
from rankloom.gateway.openai.errors import WireError

OPEN = frozenset({"/", "/healthz", "/readyz", "/console.js", "/console.css"})
"""Paths that need no key: they say nothing about models or traffic."""


@dataclass(frozen=True)
class Caller:
    """The client behind a request."""

    key: Key | None
    """None where the endpoint has no keys."""
    admin: bool


class AuthMiddleware:
    """Refuses callers without access, and sets `scope["state"]["caller"]` for the application."""

    def __init__(self, app: ASGIApp, config: Callable[[], ServeConfig], on_refusal: Callable[[int], None]) -> None:
        """
        Args:
            on_refusal: called with the HTTP status of each refusal.
        """
        self._app = app
        self._config = config
        self._on_refusal = on_refusal
        self._files: dict[str, KeyFile] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        config = self._config()
        headers = Headers(scope=scope)
        # HEAD is a GET whose body the server leaves out, and a path means the same with a slash at its end
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {**scope, "method": method, "path": scope["path"].rstrip("/") or "/"}
        try:
            scope.setdefault("state", {})["caller"] = self._authenticate(scope, headers, config)
            most = config.limits.body_bytes
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length[:20]) > most:
                raise _make_too_large_error(most)
        except WireError as error:
            self._on_refusal(error.status)
            await JSONResponse(error.make_body(), error.status, error.make_headers())(scope, receive, send)
            return
        await self._app(scope, _LimitedBody(receive, most), send)

    def _authenticate(self, scope: Scope, headers: Headers, config: ServeConfig) -> Caller:
        if config.auth.keys is None:
            local = _is_local(scope, headers)
            if not (local or config.auth.anonymous):
                raise WireError(
                    403,
                    "This endpoint has no keys, so it answers its own machine alone, in HTTP/1.1 and through no proxy. "
                    "Set auth.keys, or auth.anonymous.",
                    code="keys_required",
                )
            return Caller(None, admin=local)
        if scope["path"] in OPEN:
            return Caller(None, admin=False)
        given = _read_key(headers)
        try:
            key = self._open_file(config.auth.keys).find(given)
        except ConfigError:
            raise WireError(503, "The file of keys can't be read.", code="keys_unreadable") from None
        if key is None:
            hint = (
                "Incorrect API key provided."
                if given
                else "No API key provided: send the header Authorization: Bearer KEY."
            )
            raise WireError(401, hint, code="invalid_api_key")
        return Caller(key, admin=key.role == "admin")

    def _open_file(self, path: str) -> KeyFile:
        return self._files.setdefault(path, KeyFile(path))


class _LimitedBody:
    """Receives a request's body, and refuses it once it is too long."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._most = most
        self._seen = 0

    async def __call__(self) -> Message:
        message: MutableMapping[str, Any] = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._most:
            raise _make_too_large_error(self._most)
        return message


def _make_too_large_error(most: int) -> WireError:
    return WireError(413, f"The request's body is above {most} bytes.", code="body_too_large")


def _read_key(headers: Headers) -> str | None:
    """Return the key that a request carries: as OpenAI's clients send it, as Azure's, or as a password."""
    kind, _, given = headers.get("authorization", "").partition(" ")
    match kind.lower():
        case "bearer" if given.strip():
            return given.strip()
        case "basic":
            try:
                return base64.b64decode(given.strip(), validate=True).decode().partition(":")[2]
            except ValueError:
                return None
    return headers.get("api-key")


_PROXIES = frozenset({
    "forwarded", "via", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip", "x-envoy-external-address",
})  # fmt: skip
"""Headers that only a proxy sends, besides X-Forwarded-*."""


def _is_local(scope: Scope, headers: Headers) -> bool:
    """Return whether the request comes from this machine, without a proxy and not from another site's page.

    A page can make its own name resolve to 127.0.0.1 (DNS rebinding), but can't change the Host header. By default
    nginx sends no header about its client, but it speaks HTTP/1.0, which clients no longer do.
    """
    if scope.get("http_version") == "1.0" or any(
        name in _PROXIES or name.startswith("x-forwarded-") for name in headers
    ):
        return False
    peer = (scope.get("client") or ("",))[0]
    host = re.sub(r":\d*$", "", headers.get("host", ""))
    return _is_loopback(peer) and (host.lower() == "localhost" or _is_loopback(host.strip("[]")))


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)
