"""The Serve application: one base, several adapters, greedy completions on OpenAI's wire.

    serve run rankloom.deploy.app:build adapters=bank-intents-lora@champion registry=demo-output/registry

It is deliberately small: one replica, one request at a time under a lock, no streaming, no sampling; what a request
asks beyond that is refused, not ignored. A broken or silent adapter keeps the application from starting.
"""

# No `from __future__ import annotations`: FastAPI reads the handlers' annotations in another module's namespace.
import asyncio
import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.exceptions import HTTPException

from rankloom.config import dump, parse
from rankloom.config.serve import ServeConfig

api = FastAPI(title="rankloom")


class CompletionRequest(BaseModel):
    """The part of OpenAI's request that is understood; any other key is refused."""

    model_config = ConfigDict(extra="forbid")

    model: str
    prompt: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    temperature: Annotated[float, Field(ge=0, le=0)] = 0
    n: Literal[1] = 1
    stream: Literal[False] = False


@api.exception_handler(RequestValidationError)
async def _wrong_input(_: Request, error: RequestValidationError) -> JSONResponse:
    detail = error.errors()[0]
    key = ".".join(str(part) for part in detail["loc"] if part != "body") or "body"
    return _error(400, f"{key}: {detail['msg']}", key)


@api.exception_handler(HTTPException)
async def _refused(_: Request, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, str(error.detail), None)


def _error(status: int, message: str, param: str | None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = "model_not_found" if status == 404 and message.startswith("model ") else None
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


# Below everything that it uses: Serve pickles the class with what the module holds by then.
@serve.deployment(num_replicas=1, max_ongoing_requests=16)
@serve.ingress(api)
class Endpoint:
    """The one replica. Invariant: one generation runs at a time."""

    def __init__(self, config: dict[str, Any]) -> None:
        import torch  # in the replica alone: what deploys needs no torch

        from rankloom.deploy.engine import Engine

        self._config = parse(ServeConfig, config, "serve")
        torch.set_num_threads(self._config.cpus)
        self._engine = Engine(self._config)
        self._created = int(time.time())
        self._lock = asyncio.Lock()

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        entry = {"object": "model", "created": self._created, "owned_by": "rankloom"}
        return {"object": "list", "data": [{"id": name, **entry} for name in self._engine.models]}

    @api.post("/v1/completions")
    async def completions(self, request: CompletionRequest) -> dict[str, Any]:
        served = self._engine.models
        if request.model not in served:
            raise HTTPException(404, f"model {request.model!r} is not served; there are: {', '.join(served)}")
        if request.max_tokens > self._config.max_new_tokens:
            raise HTTPException(400, f"max_tokens {request.max_tokens} is above {self._config.max_new_tokens}")
        prompt, room = self._engine.tokens(request.prompt), self._engine.context
        if room and len(prompt) + request.max_tokens > room:
            raise HTTPException(400, f"{len(prompt)} prompt tokens + max_tokens {request.max_tokens} exceed {room}")
        async with self._lock:
            answer = await asyncio.to_thread(self._engine.generate, request.model, prompt, request.max_tokens)
        choice = {
            "index": 0,
            "text": answer.text,
            "logprobs": None,
            "finish_reason": "stop" if answer.stopped else "length",
        }
        usage = {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        }
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
            "choices": [choice],
            "usage": usage,
        }


def build(args: dict[str, Any]) -> serve.Application:
    """What `serve run` and `serve deploy` are pointed at; `args` are the keys of `ServeConfig`."""
    config = parse(ServeConfig, args, "serve")
    return Endpoint.options(ray_actor_options={"num_cpus": config.cpus}).bind(dump(config))  # type: ignore[attr-defined]
