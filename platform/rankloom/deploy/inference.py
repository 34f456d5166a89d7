"""The routes that ask a model."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response

from rankloom.config.trial import BASE
from rankloom.deploy.callers import find_tenant, get_caller, make_routing_request
from rankloom.deploy.responding import (
    EventStream,
    make_headers,
    respond_failure,
    respond_json,
    respond_whole,
    stream_events,
)
from rankloom.engine.jobs import CompletionJob
from rankloom.engine.tokens import Tokens
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.openai.embeddings import EmbeddingBuilder, EmbeddingRequest
from rankloom.gateway.openai.requests import ChatRequest, CompletionRequest
from rankloom.gateway.openai.response_events import ResponseWriter
from rankloom.gateway.openai.response_request import ResponseRequest
from rankloom.gateway.openai.responses import Kind, ResponseBuilder, make_response_id
from rankloom.gateway.openai.token_requests import DetokenizeRequest, TokenizeRequest
from rankloom.gateway.replicas import Replicas

OR_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""For the API's document: a response that may be a stream."""
AnswerT = TypeVar("AnswerT")


class InferenceRoutes:
    """Completions of prompts and of conversations, and embeddings."""

    def __init__(self, get_gateway: Callable[[], Gateway]) -> None:
        self._get_gateway = get_gateway

    def add_to(self, api: FastAPI) -> None:
        api.post("/v1/chat/completions", responses=OR_EVENTS)(self.chat_completions)
        api.post("/v1/completions", responses=OR_EVENTS)(self.completions)
        api.post("/v1/responses", responses=OR_EVENTS)(self.responses)
        api.post("/v1/embeddings")(self.embeddings)

    async def chat_completions(self, request: Request, body: ChatRequest) -> Response:
        return await self._complete(request, "chat", body)

    async def completions(self, request: Request, body: CompletionRequest) -> Response:
        return await self._complete(request, "text", body)

    async def responses(self, request: Request, body: ResponseRequest) -> Response:
        """As a chat, with OpenAI's items and events. Nothing is kept: the input is the whole conversation."""

        def new_writer(job: CompletionJob) -> ResponseWriter:
            return ResponseWriter(body, job.id, int(time.time()))

        return await self._answer(request, body, new_writer, stream=bool(body.stream))

    async def embeddings(self, request: Request, body: EmbeddingRequest) -> Response:
        return await self._answer(request, body, lambda job: EmbeddingBuilder(body, len(job.prompts)))

    async def _complete(self, request: Request, kind: Kind, body: ChatRequest | CompletionRequest) -> Response:
        def new_builder(job: CompletionJob) -> ResponseBuilder:
            id, count, logprobs = make_response_id(kind, job.id), len(job.prompts) * job.n, job.sampling.logprobs
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return ResponseBuilder(
                kind, id, body.model, int(time.time()), count, n=job.n, logprobs=logprobs is not None, usage=usage
            )

        return await self._answer(request, body, new_builder, stream=bool(body.stream))

    async def _answer(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest | ResponseRequest | EmbeddingRequest,
        new_response: Callable[[CompletionJob], Any],
        *,
        stream: bool = False,
    ) -> Response:
        """Do a request's job.

        Args:
            new_response: makes a `WholeResponse` that is a `Collector`; for a stream, a `StreamedResponse`.
        """
        gateway, key = self._get_gateway(), get_caller(request).key
        try:
            job = body.make_job(uuid.uuid4().hex, gateway.config, find_tenant(gateway, request))
            gateway.admit(key)
            routing = make_routing_request(request, job.id, body.model, body.user)
            if stream:
                in_flight = await gateway.begin(routing, job, key)
                return EventStream(in_flight, stream_events(in_flight, new_response(job), request))
            response, target = await gateway.complete(routing, job, key, lambda: new_response(job))
            return respond_whole(response, make_headers(target))
        except Exception as error:
            return respond_failure(request, error, gateway)


class TokenRoutes:
    """The tokens of texts and the text of tokens, as vLLM's server gives them."""

    def __init__(self, get_gateway: Callable[[], Gateway]) -> None:
        self._get_gateway = get_gateway

    def add_to(self, api: FastAPI) -> None:
        api.post("/tokenize")(self.tokenize)
        api.post("/detokenize")(self.detokenize)

    async def tokenize(self, request: Request, body: TokenizeRequest) -> Response:
        """The tokens of a prompt, or of a conversation up to the assistant's turn."""

        def format_body(tokens: Tokens) -> dict[str, Any]:
            names = tokens.names if body.return_token_strs else None
            count, context = len(tokens.ids), self._get_gateway().context
            return {"count": count, "max_model_len": context, "tokens": tokens.ids, "token_strs": names}

        job = body.make_job()
        return await self._ask(request, body, lambda replicas: replicas.tokenize(job), format_body)

    async def detokenize(self, request: Request, body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        tokens = tuple(body.tokens)
        return await self._ask(request, body, lambda replicas: replicas.detokenize(tokens), lambda t: {"prompt": t})

    async def _ask(
        self,
        request: Request,
        body: TokenizeRequest | DetokenizeRequest,
        question: Callable[[Replicas], Awaitable[AnswerT]],
        format_body: Callable[[AnswerT], dict[str, Any]],
    ) -> Response:
        gateway, key = self._get_gateway(), get_caller(request).key
        try:
            gateway.admit(key)
            routing = make_routing_request(request, uuid.uuid4().hex, body.model or BASE)
            answer = await gateway.ask(routing, key, question)
            return respond_json((await asyncio.to_thread(json.dumps, format_body(answer))).encode())
        except Exception as error:
            return respond_failure(request, error, gateway)
