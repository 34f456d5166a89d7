"""OpenAI's HTTP API over a `Gateway`. Every error goes out in OpenAI's shape.

`build_api` makes a plain ASGI application; `app.py` puts it into Ray Serve.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

import rankloom
from rankloom.deploy.auth import AuthMiddleware, Caller
from rankloom.deploy.logs import SERVE
from rankloom.engine.jobs import CompletionJob
from rankloom.errors import RankloomError
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.in_flight import InFlightRequest
from rankloom.gateway.openai.bodies import SMALL, read
from rankloom.gateway.openai.errors import ErrorReply, WireError, to_wire_error
from rankloom.gateway.openai.requests import AdapterRequest, ChatRequest, CompletionRequest
from rankloom.gateway.openai.responses import DONE, Kind, ResponseBuilder, format_event, make_response_id
from rankloom.gateway.policy import RoutingRequest, Target
from rankloom.registry.card import list_scorecard_rows

CONSOLE = Path(__file__).parent / "console"
LARGE = 2**20
"""Bytes of a response that is sent in parts."""
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
OR_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""For the API's document: a response that may be a stream."""
ANY_ERROR: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorReply, "description": "Whatever went wrong"}}

logger = logging.getLogger(SERVE)


def build_api(get_gateway: Callable[[], Gateway]) -> FastAPI:
    """Make the application.

    Args:
        get_gateway: returns the current gateway; called once requests come, never before.
    """
    api = FastAPI(title="rankloom", version=rankloom.__version__, docs_url=None, redoc_url=None, responses=ANY_ERROR)
    api.router.route_class = _Route
    api.state.reader = ThreadPoolExecutor(1, "bodies")  # one at a time, so that no two hold up the event loop together
    api.add_middleware(
        AuthMiddleware,
        config=lambda: get_gateway().config,
        on_refusal=lambda status: get_gateway().metrics.refused.labels(str(status)).inc(),
    )
    api.add_exception_handler(RequestValidationError, _handle_invalid_path)
    api.add_exception_handler(HTTPException, _handle_http_error)
    api.add_exception_handler(Exception, _handle_failure)
    api.add_exception_handler(WireError, _handle_failure)
    api.add_exception_handler(RankloomError, _handle_failure)
    _CompletionRoutes(get_gateway).add_to(api)
    _ModelRoutes(get_gateway).add_to(api)
    _StatusRoutes(get_gateway).add_to(api)
    return api


class _CompletionRoutes:
    """Completions of prompts and of conversations."""

    def __init__(self, get_gateway: Callable[[], Gateway]) -> None:
        self._get_gateway = get_gateway

    def add_to(self, api: FastAPI) -> None:
        api.post("/v1/chat/completions", responses=OR_EVENTS)(self.chat_completions)
        api.post("/v1/completions", responses=OR_EVENTS)(self.completions)

    async def chat_completions(self, request: Request, body: ChatRequest) -> Response:
        return await self._complete(request, "chat", body)

    async def completions(self, request: Request, body: CompletionRequest) -> Response:
        return await self._complete(request, "text", body)

    async def _complete(self, request: Request, kind: Kind, body: ChatRequest | CompletionRequest) -> Response:
        gateway, key = self._get_gateway(), _get_caller(request).key
        try:
            job = _make_job(gateway, request, body)
            gateway.admit(key)
            routing = _make_routing_request(request, job.id, body)
            new_response = partial(
                ResponseBuilder,
                kind,
                make_response_id(kind, job.id),
                body.model,
                int(time.time()),
                len(job.prompts) * job.n,
                n=job.n,
                logprobs=job.sampling.logprobs is not None,
            )
            if body.stream:
                in_flight = await gateway.begin(routing, job, key)
                usage = bool(body.stream_options and body.stream_options.include_usage)
                return _EventStream(in_flight, _stream_events(in_flight, new_response(), request, usage))
            response, target = await gateway.complete(routing, job, key, new_response)
            return _respond_whole(response, _make_headers(target))
        except Exception as error:
            return _respond_failure(request, error, gateway)


class _ModelRoutes:
    """The models that a client may name, and names given at run time."""

    def __init__(self, get_gateway: Callable[[], Gateway]) -> None:
        self._get_gateway = get_gateway
        self._list_models = _cache_by_catalogue(_describe_model)

    def add_to(self, api: FastAPI) -> None:
        api.get("/v1/models")(self.models)
        api.get("/v1/models/{name:path}")(self.model)
        api.post("/v1/load_lora_adapter")(self.load_adapter)
        api.post("/v1/unload_lora_adapter")(self.unload_adapter)

    async def models(self) -> Response:
        return _respond_json(b'{"object": "list", "data": [' + await self._list_models(self._get_gateway()) + b"]}")

    async def model(self, name: str) -> Response:
        gateway = self._get_gateway()
        if gateway.catalogue.resolve(name) is None and name not in gateway.catalogue.routes:
            return _respond_error(WireError(404, f"The model `{name[:80]}` does not exist.", code="model_not_found"))
        return JSONResponse(_describe_model(gateway, name))

    async def load_adapter(self, request: Request, body: AdapterRequest) -> Response:
        _check_admin(request)
        target = await self._get_gateway().load(body.lora_name, body.lora_path or body.lora_name)
        return JSONResponse({"loaded": body.lora_name, "adapter": target.ref}, headers=_make_headers(target))

    async def unload_adapter(self, request: Request, body: AdapterRequest) -> Response:
        _check_admin(request)
        target = await self._get_gateway().unload(body.lora_name)
        return JSONResponse({"unloaded": body.lora_name, "adapter": target.ref}, headers=_make_headers(target))


class _StatusRoutes:
    """Health, metrics and the console."""

    def __init__(self, get_gateway: Callable[[], Gateway]) -> None:
        self._get_gateway = get_gateway
        self._list_cards = _cache_by_catalogue(_describe_card)

    def add_to(self, api: FastAPI) -> None:
        api.get("/healthz")(self.healthz)
        api.get("/readyz")(self.readyz)
        api.get("/metrics", response_class=PlainTextResponse)(self.metrics)
        api.get("/", include_in_schema=False)(self.console)
        api.get("/console.{kind}", include_in_schema=False)(self.console_part)
        api.get("/console/state", include_in_schema=False)(self.console_state)

    async def healthz(self) -> Any:
        """This process answers."""
        return {"status": "ok"}

    async def readyz(self) -> Response:
        """A request would get a response: a replica holds the base, and the registry was read."""
        ready = await self._get_gateway().is_ready()
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Metrics for Prometheus. They cover all traffic, so where there are keys this needs an admin's."""
        if not _may_see_all(request):
            return _respond_error(WireError(403, "This needs an admin's key.", code="admin_required"))
        return Response(await asyncio.to_thread(self._get_gateway().metrics.expose), media_type=EXPOSITION)

    async def console(self) -> Response:
        return _read_page("index.html", "text/html")

    async def console_part(self, kind: Literal["js", "css"]) -> Response:
        return _read_page(f"console.{kind}", {"js": "text/javascript", "css": "text/css"}[kind])

    async def console_state(self, request: Request) -> Response:
        gateway = self._get_gateway()
        totals = gateway.metrics.sum_totals() if _may_see_all(request) else {}
        head = {"base": gateway.catalogue.public_base, "context": gateway.served.context} | totals
        cards = await self._list_cards(gateway)
        return _respond_json(json.dumps(head)[:-1].encode() + b', "models": [' + cards + b"]}")


def _make_job(gateway: Gateway, request: Request, body: ChatRequest | CompletionRequest) -> CompletionJob:
    """Make a job of a body. Raises WireError where the body asks for more than the limits."""
    key = _get_caller(request).key
    tenant = None if key is None or gateway.config.auth.share_prefixes else key.id
    return body.make_job(uuid.uuid4().hex, gateway.config.limits, tenant)


def _make_routing_request(request: Request, id: str, body: ChatRequest | CompletionRequest) -> RoutingRequest:
    headers = dict(request.headers.items())
    trace = headers.get("x-request-id", "")[:128] or None
    return RoutingRequest(model=body.model, id=id, user=body.user, headers=headers, trace=trace)


async def _handle_invalid_path(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    detail = error.errors()[0]
    return _respond_error(WireError(400, f"{'.'.join(map(str, detail['loc'][1:]))}: {detail['msg']}"))


async def _handle_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(WireError(error.status_code, str(error.detail)).make_body(), error.status_code, error.headers)


async def _handle_failure(request: Request, error: Exception) -> JSONResponse:
    return _respond_failure(request, error)


class _ParsedRequest(Request):
    """A request whose body was parsed already."""

    def __init__(self, request: Request, body: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._parsed = body

    async def body(self) -> bytes:
        return b"{}"  # not empty, so that FastAPI calls `json`

    async def json(self) -> Any:
        return self._parsed


class _Route(APIRoute):
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


def _cache_by_catalogue(describe: Callable[[Gateway, str], dict[str, Any]]) -> Callable[[Gateway], Awaitable[bytes]]:
    """Describe all models as the items of a JSON list: in a thread, as there may be thousands, and once a catalogue."""
    latest: tuple[Any, asyncio.Future[bytes]] | None = None

    def describe_all(gateway: Gateway) -> bytes:
        return ", ".join(json.dumps(describe(gateway, name)) for name in gateway.catalogue.list_models()).encode()

    async def get(gateway: Gateway) -> bytes:
        nonlocal latest
        source = (gateway.catalogue, gateway.config)
        if latest is None or latest[0][0] is not source[0] or latest[0][1] is not source[1]:
            latest = source, asyncio.ensure_future(asyncio.to_thread(describe_all, gateway))
        return await asyncio.shield(latest[1])

    return get


def _read_page(name: str, kind: str) -> Response:
    policy = "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
    return Response((CONSOLE / name).read_bytes(), media_type=f"{kind}; charset=utf-8", headers=headers)


def _describe_card(gateway: Gateway, name: str) -> dict[str, Any]:
    """Return what the console shows of a model: its exact version and its scorecard."""
    model = _describe_model(gateway, name)
    target = gateway.catalogue.resolve(name) if name not in gateway.catalogue.routes else None
    record = gateway.registry_view.record(target.ref) if target and target.ref else None
    if record is None:
        return model | {"ref": None}
    rows = list_scorecard_rows(record.scorecard) if record.scorecard else []
    return model | {"ref": record.ref, "method": record.method, "created": f"{record.created:%Y-%m-%d}", "rows": rows}


def _get_caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def _may_see_all(request: Request) -> bool:
    """Return whether the caller may see all traffic, not only that of its own key."""
    caller = _get_caller(request)
    return caller.key is None or caller.admin


def _check_admin(request: Request) -> None:
    caller = _get_caller(request)
    if not caller.admin:
        whose = "needs an admin's key" if caller.key else "is for the endpoint's own machine"
        raise WireError(403, f"This {whose}.", code="admin_required")


def _describe_model(gateway: Gateway, name: str) -> dict[str, Any]:
    target = gateway.catalogue.resolve(name) if name not in gateway.catalogue.routes else None
    entry: dict[str, Any] = {"id": name, "object": "model", "created": gateway.created, "owned_by": "rankloom"}
    if target and target.ref:
        entry |= {"root": target.ref, "parent": gateway.catalogue.public_base}
        if record := gateway.registry_view.record(target.ref):
            entry["created"] = int(record.created.timestamp())
    return entry | {
        "max_model_len": min(gateway.served.context, gateway.config.limits.context or gateway.served.context)
    }


def _make_headers(target: Target) -> dict[str, str]:
    """Return the headers that name the version which wrote a response."""
    version = {} if target.version is None else {"x-rankloom-version": str(target.version)}
    return {"x-rankloom-adapter": target.adapter or "base"} | version


def _respond_json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _respond_error(error: WireError) -> JSONResponse:
    return JSONResponse(error.make_body(), error.status, error.make_headers())


def _respond_failure(request: Request, error: Exception, gateway: Gateway | None = None) -> JSONResponse:
    mapped = to_wire_error(error)
    if gateway is not None:
        gateway.metrics.refused.labels(str(mapped.status)).inc()
    if mapped.status == 500:
        _log_failure(request, error)
    return _respond_error(mapped)


def _log_failure(request: Request, error: Exception) -> None:
    facts = {"event": "failure", "request_id": request.headers.get("x-request-id"), "path": request.url.path}
    # where it happened, not its message, which may quote a prompt
    where = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    logger.error(json.dumps(facts | {"error": type(error).__name__, "where": where}))


def _respond_whole(response: ResponseBuilder, headers: dict[str, str]) -> Response:
    """Return a response that is not streamed. A large one is sent in parts, between which other requests continue."""
    if response.length < LARGE:
        return Response("".join(response.iter_body()), headers=headers, media_type="application/json")

    async def parts() -> AsyncIterator[str]:
        for part in response.iter_body():
            yield part

    return StreamingResponse(parts(), headers=headers, media_type="application/json")


async def _stream_events(
    in_flight: InFlightRequest, response: ResponseBuilder, request: Request, usage: bool
) -> AsyncIterator[bytes]:
    """Yield the events of a stream. A late error is an event too, because the status was sent long before."""
    try:
        async for progress in in_flight:
            chunks = [format_event(chunk) for chunk in response.make_chunks(progress)]
            if chunks:
                yield b"".join(chunks)
        yield (format_event(response.make_usage_chunk()) if usage else b"") + DONE
    except Exception as error:
        mapped = to_wire_error(error)
        if mapped.status == 500:
            _log_failure(request, error)
        yield format_event(mapped.make_body())


class _EventStream(StreamingResponse):
    """Server-sent events. The request ends with the connection, even when nothing was read yet."""

    def __init__(self, in_flight: InFlightRequest, events: AsyncIterator[bytes]) -> None:
        headers = _make_headers(in_flight.target) | {"cache-control": "no-cache"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._in_flight.aclose()
