"""OpenAI's HTTP over a `Gateway`: parse, ask, answer. Whatever goes wrong is answered in OpenAI's shape.

`build_api` makes a plain ASGI application; `app.py` puts it into Ray Serve.
"""

# No `from __future__ import annotations`: FastAPI reads the handlers' annotations, which are local to a function here.
import asyncio
import json
import logging
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
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
from rankloom.engine.jobs import CompletionJob, ReplicaLostError
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.in_flight import ATTEMPTS, InFlightRequest
from rankloom.gateway.openai.bodies import SMALL, read
from rankloom.gateway.openai.requests import (
    AdapterRequest,
    ChatRequest,
    CompletionRequest,
    ErrorReply,
    WireError,
    wire_error,
)
from rankloom.gateway.openai.responses import DONE, Kind, ResponseBuilder, event, reply_id
from rankloom.gateway.policy import RoutingRequest, Target
from rankloom.registry.card import scorecard_rows

CONSOLE = Path(__file__).parent / "console"
LARGE = 2**20
"""Bytes of an answer that take a while to send."""
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
OR_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What the app's document says of an answer that may come in a stream."""
REFUSAL: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorReply, "description": "Whatever went wrong"}}

logger = logging.getLogger("ray.serve")


def build_api(gateway: Callable[[], Gateway]) -> FastAPI:
    """The application.

    Args:
        gateway: the gateway at that moment; not called before the first request.
    """
    api = FastAPI(title="rankloom", version=rankloom.__version__, docs_url=None, redoc_url=None, responses=REFUSAL)
    api.router.route_class = _Route
    api.state.reader = ThreadPoolExecutor(1, "bodies")  # one at a time, so that no two hold up the event loop together
    list_models, list_cards = _once_each_catalogue(_model), _once_each_catalogue(_card)
    api.add_middleware(
        AuthMiddleware,
        config=lambda: gateway().config,
        refused=lambda status: gateway().metrics.refused.labels(str(status)).inc(),
    )

    @api.exception_handler(RequestValidationError)
    async def wrong_path(_: Request, error: RequestValidationError) -> JSONResponse:
        detail = error.errors()[0]
        return _error(WireError(400, f"{'.'.join(map(str, detail['loc'][1:]))}: {detail['msg']}"))

    @api.exception_handler(WireError)
    async def wrong_body(_: Request, error: WireError) -> JSONResponse:
        return _error(error)

    @api.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        told = WireError(error.status_code, str(error.detail))
        return JSONResponse(told.body(), told.status, error.headers)

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _failed(request, error)

    async def answer(request: Request, kind: Kind, body: ChatRequest | CompletionRequest) -> Response:
        gate, caller = gateway(), _caller(request)
        try:
            prompts, sampling, most = body.wanted(gate.config.limits)
            gate.admit(caller.key)
            number = uuid.uuid4().hex
            headers = dict(request.headers.items())
            ask = RoutingRequest(body.model, number, body.user, headers, headers.get("x-request-id", "")[:128] or None)
            tenant = None if caller.key is None or gate.config.auth.share_prefixes else caller.key.id
            work = CompletionJob(number, None, prompts, sampling, body.n or 1, most, gate.config.limits.context, tenant)
            count = len(prompts) * work.n
            for attempt in range(ATTEMPTS):
                begun = await gate.begin(ask, work, caller.key)
                reply = ResponseBuilder(
                    kind,
                    reply_id(kind, number),
                    body.model,
                    int(time.time()),
                    count,
                    n=work.n,
                    logprobs=sampling.logprobs is not None,
                )
                if body.stream:
                    usage = bool(body.stream_options and body.stream_options.include_usage)
                    return _Stream(begun, _events(begun, reply, request, usage), headers=_headers(begun.target))
                try:
                    async for progress in begun:
                        reply.add(progress)
                    return _whole(reply, _headers(begun.target))
                except ReplicaLostError:  # nothing was answered yet
                    if attempt + 1 == ATTEMPTS:
                        raise
                finally:
                    await begun.aclose()
        except Exception as error:
            return _failed(request, error, gate)
        raise AssertionError("unreachable")

    @api.post("/v1/chat/completions", responses=OR_EVENTS)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await answer(request, "chat", body)

    @api.post("/v1/completions", responses=OR_EVENTS)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await answer(request, "text", body)

    @api.get("/v1/models")
    async def models() -> Response:
        return _json(b'{"object": "list", "data": [' + await list_models(gateway()) + b"]}")

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if gateway().catalogue.asked(name) is None and name not in gateway().catalogue.routes:
            return _error(WireError(404, f"The model `{name[:80]}` does not exist.", code="model_not_found"))
        return JSONResponse(_model(gateway(), name))

    @api.post("/v1/load_lora_adapter")
    async def load_adapter(request: Request, body: AdapterRequest) -> Response:
        try:
            _admin(request)
            target = await gateway().load(body.lora_name, body.lora_path or body.lora_name)
        except Exception as error:
            return _failed(request, error)
        return JSONResponse({"loaded": body.lora_name, "adapter": target.ref}, headers=_headers(target))

    @api.post("/v1/unload_lora_adapter")
    async def unload_adapter(request: Request, body: AdapterRequest) -> Response:
        try:
            _admin(request)
            target = await gateway().unload(body.lora_name)
        except Exception as error:
            return _failed(request, error)
        return JSONResponse({"unloaded": body.lora_name, "adapter": target.ref}, headers=_headers(target))

    @api.get("/healthz")
    async def healthz() -> Any:
        """This process answers."""
        return {"status": "ok"}

    @api.get("/readyz")
    async def readyz() -> Response:
        """A request would be answered: a replica holds the base, and the registry was read."""
        ready = await gateway().answers()
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """For Prometheus. It tells of all traffic, so where there are keys it takes an admin's."""
        if not _may_see_all(request):
            return _error(WireError(403, "This needs an admin's key.", code="admin_required"))
        return Response(await asyncio.to_thread(gateway().metrics.exposition), media_type=EXPOSITION)

    @api.get("/", include_in_schema=False)
    async def console() -> Response:
        return _page("index.html", "text/html")

    @api.get("/console.{kind}", include_in_schema=False)
    async def console_part(kind: Literal["js", "css"]) -> Response:
        return _page(f"console.{kind}", {"js": "text/javascript", "css": "text/css"}[kind])

    @api.get("/console/state", include_in_schema=False)
    async def console_state(request: Request) -> Response:
        gate = gateway()
        totals = gate.metrics.totals() if _may_see_all(request) else {}
        head = {"base": gate.catalogue.shown, "context": gate.served.context} | totals
        return _json(json.dumps(head)[:-1].encode() + b', "models": [' + await list_cards(gate) + b"]}")

    return api


class _Read(Request):
    """A request whose body was read already."""

    def __init__(self, request: Request, asked: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._asked = asked

    async def body(self) -> bytes:
        return b"{}"  # there is one

    async def json(self) -> Any:
        return self._asked


class _Route(APIRoute):
    """Reads a body in a thread where it is large; FastAPI would on the event loop, and tell of every mistake in it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        kind = self.body_field.field_info.annotation
        assert isinstance(kind, type)

        async def read_and_handle(request: Request) -> Response:
            what = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if what != "application/json" and not (what.startswith("application/") and what.endswith("+json")):
                raise WireError(400, "The body is to be JSON: send the header content-type: application/json.")
            try:
                body = await request.body()
            except ClientDisconnect:
                raise WireError(400, "The body ended early.") from None
            if len(body) <= SMALL:
                asked = read(kind, body)
            else:
                loop = asyncio.get_running_loop()
                asked = await loop.run_in_executor(request.app.state.reader, read, kind, body)
            return await handle(_Read(request, asked))

        return read_and_handle


def _once_each_catalogue(tell: Callable[[Gateway, str], dict[str, Any]]) -> Callable[[Gateway], Awaitable[bytes]]:
    """What is told of all models, as the items of a JSON list. Made in a thread, as it may be thousands, and kept."""
    held: tuple[Any, asyncio.Future[bytes]] | None = None

    def make(gate: Gateway) -> bytes:
        return ", ".join(json.dumps(tell(gate, name)) for name in gate.catalogue.models()).encode()

    async def get(gate: Gateway) -> bytes:
        nonlocal held
        of = (gate.catalogue, gate.config)
        if held is None or held[0][0] is not of[0] or held[0][1] is not of[1]:
            held = of, asyncio.ensure_future(asyncio.to_thread(make, gate))
        return await asyncio.shield(held[1])

    return get


def _page(name: str, kind: str) -> Response:
    policy = "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
    return Response((CONSOLE / name).read_bytes(), media_type=f"{kind}; charset=utf-8", headers=headers)


def _card(gateway: Gateway, name: str) -> dict[str, Any]:
    """What the console shows of a model: its exact version and its scorecard."""
    model = _model(gateway, name)
    target = gateway.catalogue.asked(name) if name not in gateway.catalogue.routes else None
    record = gateway.shelves.record(target.ref) if target and target.ref else None
    if record is None:
        return model | {"ref": None}
    rows = scorecard_rows(record.scorecard) if record.scorecard else []
    return model | {"ref": record.ref, "method": record.method, "created": f"{record.created:%Y-%m-%d}", "rows": rows}


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def _may_see_all(request: Request) -> bool:
    """Whether what others do may be told: one key's traffic is not another's to see."""
    caller = _caller(request)
    return caller.key is None or caller.admin


def _admin(request: Request) -> None:
    caller = _caller(request)
    if not caller.admin:
        whose = "needs an admin's key" if caller.key else "is for the endpoint's own machine"
        raise WireError(403, f"This {whose}.", code="admin_required")


def _model(gateway: Gateway, name: str) -> dict[str, Any]:
    target = gateway.catalogue.asked(name) if name not in gateway.catalogue.routes else None
    entry: dict[str, Any] = {"id": name, "object": "model", "created": gateway.created, "owned_by": "rankloom"}
    if target and target.ref:
        entry |= {"root": target.ref, "parent": gateway.catalogue.shown}
        if record := gateway.shelves.record(target.ref):
            entry["created"] = int(record.created.timestamp())
    return entry | {
        "max_model_len": min(gateway.served.context, gateway.config.limits.context or gateway.served.context)
    }


def _headers(target: Target) -> dict[str, str]:
    """What the answer was made with."""
    version = {} if target.version is None else {"x-rankloom-version": str(target.version)}
    return {"x-rankloom-adapter": target.adapter or "base"} | version


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _error(error: WireError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers())


def _failed(request: Request, error: Exception, gateway: Gateway | None = None) -> JSONResponse:
    told = wire_error(error)
    if gateway is not None:
        gateway.metrics.refused.labels(str(told.status)).inc()
    if told.status == 500:
        _log_failure(request, error)
    return _error(told)


def _log_failure(request: Request, error: Exception) -> None:
    facts = {"event": "failure", "request_id": request.headers.get("x-request-id"), "path": request.url.path}
    # where it happened, not its message, which may quote a prompt
    where = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    logger.error(json.dumps(facts | {"error": type(error).__name__, "where": where}))


def _whole(reply: ResponseBuilder, headers: dict[str, str]) -> Response:
    """An answer that is not streamed; a large one is sent in parts, between which others have their turn."""
    if reply.length < LARGE:
        return Response("".join(reply.body()), headers=headers, media_type="application/json")

    async def parts() -> AsyncIterator[str]:
        for part in reply.body():
            yield part

    return StreamingResponse(parts(), headers=headers, media_type="application/json")


async def _events(
    answer: InFlightRequest, reply: ResponseBuilder, request: Request, usage: bool
) -> AsyncIterator[bytes]:
    """The stream. An error in its midst is an event of its own, for the status was sent long before."""
    try:
        async for progress in answer:
            chunks = [event(chunk) for chunk in reply.chunks(progress)]
            if chunks:
                yield b"".join(chunks)
        yield (event(reply.usage_chunk()) if usage else b"") + DONE
    except Exception as error:
        told = wire_error(error)
        if told.status == 500:
            _log_failure(request, error)
        yield event(told.body())


class _Stream(StreamingResponse):
    """Server-sent events; the request ends with the connection, also when nothing was read yet."""

    def __init__(self, answer: InFlightRequest, content: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(content, headers=headers | {"cache-control": "no-cache"}, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()
