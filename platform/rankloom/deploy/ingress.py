"""OpenAI's HTTP API over a `Gateway`. Every error goes out in OpenAI's shape.

`build_api` makes a plain ASGI application; `app.py` puts it into Ray Serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

import rankloom
from rankloom.deploy.auth import AuthMiddleware
from rankloom.deploy.bodies import BodyRoute
from rankloom.deploy.callers import check_admin, may_see_all
from rankloom.deploy.console_routes import ConsoleRoutes
from rankloom.deploy.cors import CorsMiddleware
from rankloom.deploy.descriptions import cache_by_catalogue, describe_model
from rankloom.deploy.forwarding import Forwarding
from rankloom.deploy.inference import InferenceRoutes, TokenRoutes
from rankloom.deploy.responding import make_headers, respond_error, respond_failure, respond_json
from rankloom.errors import RankloomError
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.openai.errors import ErrorReply, WireError
from rankloom.gateway.openai.requests import AdapterRequest

EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
ANY_ERROR: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorReply, "description": "Whatever went wrong"}}


def build_api(get_gateway: Callable[[], Gateway]) -> FastAPI:
    """Make the application.

    Args:
        get_gateway: returns the current gateway; called once requests come, never before.
    """

    async def handle_failure(request: Request, error: Exception) -> JSONResponse:
        return respond_failure(request, error, get_gateway())

    api = FastAPI(title="rankloom", version=rankloom.__version__, docs_url=None, redoc_url=None, responses=ANY_ERROR)
    api.router.route_class = BodyRoute
    api.state.reader = ThreadPoolExecutor(1, "bodies")  # one at a time, so that no two hold up the event loop together
    api.add_middleware(
        AuthMiddleware,
        config=lambda: get_gateway().config,
        on_refusal=lambda status: get_gateway().metrics.refused.labels(str(status)).inc(),
    )
    api.add_middleware(CorsMiddleware, config=lambda: get_gateway().config)  # the last one added is the first
    api.add_exception_handler(RequestValidationError, _handle_invalid_path)
    api.add_exception_handler(HTTPException, _handle_http_error)
    for kind in (WireError, RankloomError, Exception):
        api.add_exception_handler(kind, handle_failure)
    InferenceRoutes(get_gateway).add_to(api)
    TokenRoutes(get_gateway).add_to(api)
    _ModelRoutes(get_gateway).add_to(api)
    _StatusRoutes(get_gateway).add_to(api)
    ConsoleRoutes(get_gateway).add_to(api)
    api.state.forwarding = Forwarding(get_gateway)
    api.state.forwarding.add_to(api)
    return api


class _ModelRoutes:
    """The models that a client may name, and names given at run time."""

    def __init__(self, get_gateway: Callable[[], Gateway]) -> None:
        self._get_gateway = get_gateway
        self._list_models = cache_by_catalogue(describe_model)

    def add_to(self, api: FastAPI) -> None:
        api.get("/v1/models")(self.models)
        api.get("/v1/models/{name:path}")(self.model)
        api.post("/v1/load_lora_adapter")(self.load_adapter)
        api.post("/v1/unload_lora_adapter")(self.unload_adapter)

    async def models(self) -> Response:
        return respond_json(b'{"object": "list", "data": [' + await self._list_models(self._get_gateway()) + b"]}")

    async def model(self, name: str) -> Response:
        gateway = self._get_gateway()
        if gateway.catalogue.resolve(name) is None and name not in gateway.catalogue.routes:
            return respond_error(WireError(404, f"The model `{name[:80]}` does not exist.", code="model_not_found"))
        return JSONResponse(describe_model(gateway, name))

    async def load_adapter(self, request: Request, body: AdapterRequest) -> Response:
        check_admin(request)
        target = await self._get_gateway().load(body.lora_name, body.lora_path or body.lora_name)
        return JSONResponse({"loaded": body.lora_name, "adapter": target.ref}, headers=make_headers(target))

    async def unload_adapter(self, request: Request, body: AdapterRequest) -> Response:
        check_admin(request)
        target = await self._get_gateway().unload(body.lora_name)
        return JSONResponse({"unloaded": body.lora_name, "adapter": target.ref}, headers=make_headers(target))


class _StatusRoutes:
    """Health and metrics."""

    def __init__(self, get_gateway: Callable[[], Gateway]) -> None:
        self._get_gateway = get_gateway

    def add_to(self, api: FastAPI) -> None:
        api.get("/healthz")(self.healthz)
        api.get("/readyz")(self.readyz)
        api.get("/metrics", response_class=PlainTextResponse)(self.metrics)

    async def healthz(self) -> Any:
        """This process answers."""
        return {"status": "ok"}

    async def readyz(self) -> Response:
        """A request would get a response: a replica holds the base, and the registry was read."""
        ready = await self._get_gateway().is_ready()
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Metrics for Prometheus. They cover all traffic, so where there are keys this needs an admin's."""
        if not may_see_all(request):
            return respond_error(WireError(403, "This needs an admin's key.", code="admin_required"))
        return Response(await asyncio.to_thread(self._get_gateway().metrics.expose), media_type=EXPOSITION)


async def _handle_invalid_path(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    detail = error.errors()[0]
    return respond_error(WireError(400, f"{'.'.join(map(str, detail['loc'][1:]))}: {detail['msg']}"))


async def _handle_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(WireError(error.status_code, str(error.detail)).make_body(), error.status_code, error.headers)
