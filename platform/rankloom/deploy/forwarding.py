"""Requests that the engine's own server reads, behind the same gateway as all others."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from rankloom.config.engine import VllmConfig
from rankloom.deploy.callers import find_tenant, get_caller, make_routing_request
from rankloom.deploy.responding import (
    EventStream,
    encode_json,
    make_headers,
    respond_failure,
    respond_json,
    stream_events,
)
from rankloom.engine.forward import PATHS
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.openai.forwarding import ForwardBody, ForwardReply, ForwardStream, make_forward_job
from rankloom.gateway.openai.responses import DONE

READ = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")
"""Paths that mean the same on every engine, as far as rankloom reads their bodies."""


class Forwarding:
    """Sends requests to the engine's own server, those that rankloom can't read or those that it is not to read."""

    def __init__(self, get_gateway: Callable[[], Gateway]) -> None:
        self._get_gateway = get_gateway

    def add_to(self, api: FastAPI) -> None:
        """Add the paths that an application has not yet."""
        known = {route.path for route in api.routes if isinstance(route, APIRoute)}
        for path in PATHS:
            if path not in known:
                api.post(path, include_in_schema=False)(self._refuse)

    def takes(self, path: str) -> bool:
        """Return whether requests that rankloom can't read are forwarded."""
        return path in self._get_gateway().served.routes

    def takes_all(self, path: str) -> bool:
        """Return whether all requests are forwarded, also those that rankloom can read."""
        engine = self._get_gateway().config.engine
        return self.takes(path) and (
            path not in READ or (isinstance(engine, VllmConfig) and engine.passthrough == "all")
        )

    async def respond(self, request: Request, body: ForwardBody) -> Response:
        gateway, path, key = self._get_gateway(), request.scope["path"], get_caller(request).key
        try:
            job = make_forward_job(
                path, body.model_extra or {}, gateway.served.routes[path], gateway.config.limits,
                gateway.served.context, uuid.uuid4().hex, find_tenant(gateway, request),
            )  # fmt: skip
            gateway.admit(key)
            user = job.body.get("user")
            routing = make_routing_request(request, job.id, job.body["model"], user if isinstance(user, str) else None)
            if job.body.get("stream"):
                in_flight = await gateway.begin(routing, job, key)
                end = b"" if path == "/v1/responses" else DONE
                return EventStream(in_flight, stream_events(in_flight, ForwardStream(end), request))
            reply, target = await gateway.complete(routing, job, key, ForwardReply)
            return respond_json(await encode_json(reply.body), make_headers(target))
        except Exception as error:
            return respond_failure(request, error, gateway)

    async def _refuse(self, body: ForwardBody) -> Response:
        raise HTTPException(404)
