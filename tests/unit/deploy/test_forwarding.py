"""Requests that go on to vLLM's own server: over HTTP, through the gateway and the engine, to `stub_vllm`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from endpoint import endpoint, listening
from rankloom.config import parse
from rankloom.config.engine import VllmConfig
from rankloom.config.model import ModelConfig
from rankloom.config.serve import ServeConfig
from rankloom.engine.forward import ForwardJob, Job, Progress
from rankloom.engine.jobs import run
from rankloom.engine.vllm.engine import VllmEngine
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.keys import KeyFile
from rankloom.gateway.replicas import Served
from rankloom.models import load_outline
from rankloom.registry import Registry
from stubbed import make_python, publish_probed

CHAT = "/v1/chat/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, IMAGE]}],
    "logit_bias": {"5": -3}, "chat_template_kwargs": {"enable_thinking": False}, "n": 2,
}  # fmt: skip


class Replicas:
    """One replica in this process, which starts when it is first asked."""

    def __init__(self, engine: VllmEngine, fingerprint: str) -> None:
        self.engine, self._fingerprint, self._started = engine, fingerprint, False

    async def run(self, job: Job) -> AsyncIterator[Progress]:
        stream: Any = self.engine.forward(job) if isinstance(job, ForwardJob) else run(self.engine, job)
        try:
            async for progress in stream:
                yield progress
        finally:
            await stream.aclose()

    async def describe(self) -> Served:
        if not self._started:
            self._started = True
            await self.engine.start()
        return Served("org/base", self._fingerprint, "none", self.engine.context, self.engine.routes)

    async def load(self, ref: str) -> None:
        await self.engine.pin(ref)


@contextmanager
def forwarding(base: Path, work: Path, **config: Any) -> Iterator[tuple[httpx2.Client, Gateway, Replicas]]:
    """An endpoint with `lora` 1 and 2 (refused there), and `rslora`."""
    root, python = work / "registry", make_python(work)
    for kind, rank, name in (("lora", 4, "lora"), ("patterns", 7, "lora"), ("rslora", 12, "rslora")):
        publish_probed(base, root, work / str(rank), kind, rank, name)
    engine = {"type": "vllm", "python": python, "startup_timeout_s": 60} | config.pop("engine", {})
    serve = parse(ServeConfig, {"base": "org/base", "engine": engine, "refresh_s": 600} | config)
    assert isinstance(serve.engine, VllmConfig)
    outline, registry = load_outline(ModelConfig(id=str(base)), dtype=torch.float32), Registry(root)
    registry.promote("lora@1")
    replicas = Replicas(VllmEngine(outline, registry, serve.engine, threads=1), outline.fingerprint)
    gateway = Gateway(serve, registry, replicas)  # type: ignore[arg-type]
    close = gateway.close

    async def close_both() -> None:
        await close()
        await replicas.engine.close()

    gateway.close = close_both  # type: ignore[method-assign]
    with listening(gateway) as url, httpx2.Client(base_url=url, timeout=60) as http:
        yield http, gateway, replicas


@pytest.fixture(scope="module")
def shared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx2.Client, Gateway]]:
    routes = {"best": {"to": "lora@2", "fallback": ["lora@1"]}}
    with forwarding(tiny_llama, tmp_path_factory.mktemp("forwarding"), routes=routes) as (http, gateway, _):
        yield http, gateway


def read_events(answer: httpx2.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_body_reaches_vllm_as_it_came(shared: Any, caplog: pytest.LogCaptureFixture) -> None:
    http, _ = shared
    caplog.set_level(logging.INFO, "rankloom.gateway")
    answer = http.post(CHAT, json={"model": "lora@champion", "max_tokens": 50, **ASKED})
    assert (answer.status_code, answer.headers["x-rankloom-adapter"], answer.headers["x-rankloom-version"]) == (
        200, "lora", "1",
    )  # fmt: skip
    body = answer.json()
    seen = body.pop("seen")
    assert body["model"] == "lora@champion"
    assert seen.pop("request_id")
    assert seen == {"model": "lora@1", "max_tokens": 50, **ASKED}
    deadline = time.monotonic() + 10
    while not (lines := [json.loads(r.message) for r in caplog.records if '"request"' in r.message]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert {
        "adapter": "lora@1",
        "outcome": "ok",
        "path": CHAT,
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "n": 2,
    }.items() <= lines[-1].items()
    assert "What is it" not in caplog.text
    exposed = http.get("/metrics").text
    for kind, count in (("prompt", 7), ("completion", 4), ("cached", 2)):
        assert f'rankloom_tokens_total{{adapter="lora@1",kind="{kind}",traffic="live"}} {count}.0' in exposed
    assert 'rankloom_first_token_seconds_count{adapter="lora@1"' not in exposed  # it came whole


@pytest.mark.parametrize(
    ("options", "with_usage"),
    [(None, []), ({"include_usage": True}, [4]), ({"continuous_usage_stats": True, "include_usage": True}, range(5))],
)
def test_a_stream_has_what_was_asked_for(shared: Any, options: Any, with_usage: Any) -> None:
    http, _ = shared
    body = {"model": "base", "stream": True, **ASKED} | ({} if options is None else {"stream_options": options})
    answer = http.post(CHAT, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end = read_events(answer)
    assert end == "[DONE]"
    assert [bool(event["choices"]) for event in events] == [True] * 4 + [False] * (options is not None)
    assert [number for number, event in enumerate(events) if "usage" in event] == list(with_usage)
    assert {event["model"] for event in events} == {"base"}
    assert events[0]["seen"]["model"] == "zero"  # on a CPU the base has an adapter that changes nothing
    assert events[0]["seen"]["max_completion_tokens"] == 128  # the endpoint's own limit, or the context


def test_what_rankloom_reads_is_read_by_rankloom(shared: Any) -> None:
    http, _ = shared
    answer = http.post("/v1/completions", json={"model": "lora", "prompt": [5, 30], "max_tokens": 2})
    assert answer.json()["object"] == "text_completion"
    assert "seen" not in answer.json()


def test_a_route_falls_back_before_anything_is_sent(shared: Any) -> None:
    http, _ = shared
    for stream in (False, True):
        answer = http.post(CHAT, json={"model": "best", "stream": stream, **ASKED})
        assert (answer.status_code, answer.headers["x-rankloom-version"]) == (200, "1")
        seen = read_events(answer)[0] if stream else answer.json()
        assert (seen["seen"]["model"], seen["model"]) == ("lora@1", "best")


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (CHAT, {"model": "base", **ASKED, "logit_bia": {}}, 400, "logit_bia: unknown key; did you mean 'logit_bias'?"),
        (CHAT, {"model": "base", **ASKED, "zzz": 1}, 400, "zzz: unknown key; known keys: cache_salt"),
        (CHAT, {"model": "base", **ASKED, "kv_transfer_params": {}}, 400, "kv_transfer_params: unknown key"),
        (CHAT, ASKED, 400, "model: required"),
        (CHAT, {"model": "no-such", **ASKED}, 404, "no-such"),
        (CHAT, {"model": "base", **ASKED, "max_tokens": 5000}, 400, "max_tokens 5000 is above 4096"),
        (CHAT, {"model": "base", **ASKED, "max_tokens": "many"}, 400, "max_tokens: expected a whole number"),
        (CHAT, {"model": "base", **ASKED, "n": 17}, 400, "17 completions in one request, above 16"),
        (CHAT, {"model": "base", **ASKED, "stream": "false"}, 400, "stream: expected true or false"),
        (CHAT, {"model": "base", **ASKED, "stream_options": "all"}, 400, "stream_options: expected an object"),
        ("/v1/embeddings", {"model": "base", "input": ["a"] * 2049}, 400, "2049 texts in one request, above 2048"),
        ("/v1/completions", {"model": "base", "prompt": ["a"] * 17, "min_tokens": 1}, 400, "17 completions"),
        (CHAT, {"model": "base", **ASKED, "messages": [{"content": "FAIL"}]}, 400, "vLLM: that is no chat"),
        (CHAT, {"model": "lora@2", **ASKED}, 422, "seven is no rank"),
        ("/v1/embeddings", [1], 400, "expected an object"),
        ("/score", {"model": "base"}, 404, "Not Found"),
    ],
)
def test_what_is_refused(shared: Any, path: str, body: Any, status: int, message: str) -> None:
    http, _ = shared
    answer = http.post(path, json=body)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text


def test_embeddings_are_vllm_s(shared: Any) -> None:
    http, _ = shared
    answer = http.post("/v1/embeddings", json={"model": "rslora", "input": ["a", "b"], "dimensions": 4})
    assert (answer.status_code, answer.headers["x-rankloom-adapter"]) == (200, "rslora")
    assert answer.json()["seen"] == {"model": "rslora@1", "input": ["a", "b"], "dimensions": 4}
    assert answer.json()["model"] == "rslora"


def test_keys_hold_and_keep_prefixes_apart(tiny_llama: Path, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key, record = file.create("ann", tokens_per_minute=20)
    limits = {"max_tokens": 10}
    with forwarding(tiny_llama, tmp_path, auth={"keys": str(file.path)}, limits=limits) as (http, _, _):
        assert http.post(CHAT, json={"model": "base", **ASKED}).status_code == 401
        body = {"model": "base", "cache_salt": "mine", **ASKED}
        answer = http.post(CHAT, json=body, headers={"authorization": f"Bearer {key}"})
        assert answer.json()["seen"]["cache_salt"] == f"{record.id}mine"
        answer = http.post(CHAT, json=body, headers={"authorization": f"Bearer {key}"})  # 11 tokens each
        assert answer.status_code == 200
        answer = http.post(CHAT, json=body, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 429
        assert answer.json()["error"]["type"] == "tokens"


def test_everything_can_pass_through_and_a_client_that_goes_ends_it(tiny_llama: Path, tmp_path: Path) -> None:
    with forwarding(tiny_llama, tmp_path, engine={"passthrough": "all"}) as (http, gateway, replicas):
        plain = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
        assert http.post(CHAT, json=plain).json()["seen"]["messages"] == plain["messages"]
        slow = {"model": "base", "stream": True, "messages": [{"role": "user", "content": "SLOW"}]}
        with http.stream("POST", CHAT, json=slow) as answer:
            next(answer.iter_bytes())
        deadline = time.monotonic() + 4  # before it would end by itself
        while gateway._quotas.in_flight or replicas.engine._admission.open:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # of the second answer, as many tokens as had come before the client went
        assert gateway.metrics.sum_totals()["completion_tokens"] in (4 + 1, 4 + 2)


def test_a_limit_of_the_context_is_not_passed_by(tiny_llama: Path, tmp_path: Path) -> None:
    with forwarding(tiny_llama, tmp_path, limits={"context": 100}) as (http, _, _):
        answer = http.post(CHAT, json={"model": "base", **ASKED})
        assert answer.status_code == 400
        assert "limits.context=100 holds only" in answer.json()["error"]["message"]


def test_rankloom_s_own_engine_reads_all_itself(tmp_path: Path) -> None:
    with endpoint(tmp_path) as made:
        for path, body, status in (
            (CHAT, {"model": "bank", **ASKED}, 400),
            ("/score", {"model": "bank"}, 404),
            ("/pooling", {}, 404),
        ):
            assert made.post(path, body).status_code == status
