"""An endpoint over real HTTP without Ray or a model: a gateway, its ingress and server, with `EchoEngine` behind."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from openai import OpenAI
from safetensors.numpy import save_file

from echo_engine import EchoEngine
from rankloom.config import parse
from rankloom.config.serve import ServeConfig
from rankloom.deploy.http_server import HttpServer
from rankloom.deploy.ingress import build_api
from rankloom.engine.jobs import CompletionJob, JobProgress, ReplicaLostError, run
from rankloom.engine.tokens import TokenizeJob, Tokens, detokenize, tokenize
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.replicas import Served
from rankloom.registry import Draft, Registry

FINGERPRINT = "sha256:" + "0" * 64


def publish(registry: Registry, name: str, work: Path, *, fingerprint: str = FINGERPRINT) -> str:
    """Publish the next version of an adapter that no model could load, and return its ref."""
    folder = work / f"{name}-{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    save_file({"layer.lora_A.weight": np.ones((2, 2), np.float32)}, folder / "adapter_model.safetensors")
    draft = {
        "method": "lora",
        "base": {"id": "org/base", "fingerprint": fingerprint, "quantization": "none"},
        "servable": "itself",
        "trial": {"name": name},
        "data_fingerprint": None,
        "scorecard": None,
        "versions": {"rankloom": "0", "torch": "0", "transformers": "0", "peft": "0"},
    }
    return registry.publish(name, folder, Draft.model_validate(draft)).ref


class Replicas:
    """A replica in this process; `lose` makes the next runs end as if its process had died."""

    def __init__(self, broken: Sequence[str] = ()) -> None:
        self.engine = EchoEngine(broken)
        self.lose: list[int] = []
        """Number of parts after which each of the next runs is lost."""
        self.begun = 0

    async def run(self, job: CompletionJob) -> AsyncIterator[JobProgress]:
        self.begun += 1
        left = self.lose.pop(0) if self.lose else None
        stream = run(self.engine, job)
        try:
            async for progress in stream:
                if left == 0:
                    raise ReplicaLostError("the replica died")
                left = None if left is None else left - 1
                yield progress
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    async def describe(self) -> Served:
        return Served("org/base", FINGERPRINT, "none", self.engine.context)

    async def tokenize(self, job: TokenizeJob) -> Tokens:
        return await tokenize(self.engine, job)

    async def detokenize(self, tokens: tuple[int, ...]) -> str:
        return await detokenize(self.engine, tokens)

    async def load(self, ref: str) -> None:
        await self.engine.pin(ref)


class Endpoint:
    """An endpoint, with everything behind it, for a test."""

    def __init__(self, url: str, gateway: Gateway, replicas: Replicas, registry: Registry, work: Path) -> None:
        self.url = url
        self.gateway = gateway
        self.replicas = replicas
        self.registry = registry
        self.work = work
        self.http = httpx2.Client(base_url=url, timeout=20)

    def client(self, key: str = "none", retries: int = 0) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=retries, timeout=20)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        return self.http.post(path, content=content, headers=headers, **options)

    def settled(self) -> None:
        """Wait until no request is running."""
        deadline = time.monotonic() + 10
        while self.gateway._quotas.in_flight or self.replicas.engine.under_way:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextmanager
def endpoint(tmp_path: Path, broken: Sequence[str] = (), host: str = "127.0.0.1", **config: Any) -> Iterator[Endpoint]:
    """Start an endpoint with `bank` 1 (champion) and 2, `faq` 1, and `alien` 1 on another base; it serves all."""
    registry = Registry(tmp_path / "endpoint-registry")
    if not registry.names():
        for name in ("bank", "bank", "faq"):
            publish(registry, name, tmp_path / "adapters")
        publish(registry, "alien", tmp_path / "adapters", fingerprint="sha256:" + "1" * 64)
        registry.promote("bank@1")
    replicas = Replicas(broken)
    gateway = Gateway(parse(ServeConfig, {"base": "org/base", "refresh_s": 0.2} | config), registry, replicas)
    with listening(gateway, host) as url:
        made = Endpoint(url, gateway, replicas, registry, tmp_path / "adapters")
        with made.http:
            yield made


@contextmanager
def listening(gateway: Gateway, host: str = "127.0.0.1") -> Iterator[str]:
    """Start a gateway, serve it over HTTP at the yielded URL, and stop both."""
    started: Future[tuple[str, Callable[[], None]]] = Future()

    async def serve() -> None:
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        await gateway.start()
        server = HttpServer(build_api(lambda: gateway), host, 0)
        server.start()
        started.set_result((f"http://{host}:{server.port}", lambda: loop.call_soon_threadsafe(ended.set)))
        await ended.wait()
        await server.close()
        await gateway.close()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    url, end = started.result(20)
    try:
        yield url
    finally:
        end()
        thread.join(20)
