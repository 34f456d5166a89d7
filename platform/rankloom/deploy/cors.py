"""ASGI middleware: lets pages of other origins call the endpoint, as its config says. Authentication comes after it."""

from __future__ import annotations

from collections.abc import Callable

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from rankloom.config.serve import ServeConfig

EXPOSED = ("x-rankloom-adapter", "x-rankloom-version", "x-request-id", "retry-after")
"""Headers of an answer that a page may read."""


class CorsMiddleware:
    """starlette's CORSMiddleware for the origins of the current config, or nothing where it has none."""

    def __init__(self, app: ASGIApp, config: Callable[[], ServeConfig]) -> None:
        self._app, self._config = app, config
        self._made: tuple[list[str], ASGIApp] = ([], app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origins = self._config().auth.cors_origins if scope["type"] == "http" else []
        if origins != self._made[0]:
            self._made = origins, self._wrap(origins)
        await self._made[1](scope, receive, send)

    def _wrap(self, origins: list[str]) -> ASGIApp:
        if not origins:
            return self._app
        return CORSMiddleware(
            self._app,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # clients and header rules have headers of their own
            allow_credentials="*" not in origins,
            expose_headers=EXPOSED,
        )
