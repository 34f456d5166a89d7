"""`/v1/embeddings` over real HTTP, by the engine without a model: its wire, and that it is a request like any other."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from endpoint import Endpoint, endpoint
from rankloom.gateway.keys import KeyFile


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    routes = {"help": {"to": "faq", "fallback": ["bank"]}, "shadowed": {"to": "bank", "shadow": {"to": "bank@2"}}}
    with endpoint(tmp_path_factory.mktemp("endpoint"), broken=["faq@1"], routes=routes) as made:
        yield made


def test_texts_and_tokens_in_both_formats(shared: Endpoint) -> None:
    client = shared.client()
    for given in (["hi", "you"], [[104, 105], [121, 111, 117]]):
        for encoding in ({}, {"encoding_format": "float"}):
            answer = client.embeddings.create(model="bank", input=given, **encoding)  # type: ignore[call-overload]
            expected = [[2.0, 104.0, 6.0, pytest.approx(0.1)], [3.0, 121.0, 6.0, pytest.approx(0.1)]]
            assert [each.embedding for each in answer.data] == expected
            assert [(each.index, each.object) for each in answer.data] == [(0, "embedding"), (1, "embedding")]
            assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (5, 5)
            assert (answer.object, answer.model) == ("list", "bank")
    raw = shared.post("/v1/embeddings", {"model": "bank@2", "input": "hi", "encoding_format": "base64"})
    numbers = struct.unpack("<4f", base64.b64decode(raw.json()["data"][0]["embedding"]))
    assert struct.pack("<4f", *numbers) == struct.pack("<4f", 2, 104, 6, 0.1)
    assert (raw.headers["x-rankloom-adapter"], raw.headers["x-rankloom-version"]) == ("bank", "2")
    float_text = shared.post("/v1/embeddings", {"model": "bank", "input": [104], "dimensions": 1}).json()
    assert float_text["data"][0]["embedding"] == [1.0]


def test_very_many_texts_come_a_few_at_a_time(shared: Endpoint) -> None:
    texts = [f"text {number}" for number in range(2048)]
    answer = shared.client().embeddings.create(model="bank", input=texts)
    assert [each.embedding[0] for each in answer.data] == [float(len(text)) for text in texts]
    with pytest.raises(openai.BadRequestError, match="input: 2049 texts in one request, above 2048"):
        shared.client().embeddings.create(model="bank", input=[*texts, "one more"])


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"input": []}, 400, "input: at least 1"),
        ({"input": ""}, 400, "The prompt is empty."),
        ({"input": ["a", ""]}, 400, "The prompt is empty."),
        ({"input": 5}, 400, "input: expected a text, a list of texts, a list of token ids"),
        ({"input": "x" * 257}, 400, "maximum context length is 256 tokens"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions: must be greater"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format: only 'float' or 'base64'"),
        ({"input": "a", "stream": True}, 400, "stream: unknown key"),
        ({"input": "a", "model": "bnk"}, 404, "Did you mean `bank`?"),
        ({"input": "a", "model": "faq@1"}, 422, "faq@1 does nothing"),
        ({"input": "overload"}, 503, "the queue is full"),
    ],
    ids=str,
)
def test_mistakes_are_named(shared: Endpoint, body: dict[str, Any], status: int, message: str) -> None:
    answer = shared.post("/v1/embeddings", {"model": "bank"} | body)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text


def test_a_prompt_may_fill_the_context(shared: Endpoint) -> None:
    assert shared.client().embeddings.create(model="bank", input="x" * 256).usage.prompt_tokens == 256


def test_routes_fall_back_and_shadow_and_a_lost_replica_is_replaced(shared: Endpoint) -> None:
    raw = shared.post("/v1/embeddings", {"model": "help", "input": "hi"})
    assert raw.headers["x-rankloom-adapter"] == "bank"
    shared.replicas.lose = [0]
    assert shared.post("/v1/embeddings", {"model": "bank", "input": ["hi", "you"]}).status_code == 200
    before = shared.http.get("/metrics").text.count('adapter="bank@2",outcome="ok",traffic="shadow"')
    shared.post("/v1/embeddings", {"model": "shadowed", "input": "hi"})
    shared.settled()
    assert shared.http.get("/metrics").text.count('adapter="bank@2",outcome="ok",traffic="shadow"') == before + 1


def test_keys_limits_metrics_and_the_log_are_those_of_completions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    secret, key = keys.create("ann", tokens_per_minute=4)
    admin, _ = keys.create("ops", "admin")
    with endpoint(tmp_path, auth={"keys": str(keys.path)}) as made:
        caplog.set_level("INFO", logger="rankloom.gateway")
        with pytest.raises(openai.AuthenticationError):
            made.client("none").embeddings.create(model="bank", input="hi")
        made.client(secret).embeddings.create(model="bank", input="hello")
        made.settled()
        with pytest.raises(openai.RateLimitError, match="tokens a minute"):
            made.client(secret).embeddings.create(model="bank", input="hello")
        metrics = made.http.get("/metrics", headers={"authorization": f"Bearer {admin}"}).text
    assert 'rankloom_tokens_total{adapter="bank@1",kind="prompt",traffic="live"} 5.0' in metrics
    assert 'rankloom_requests_total{adapter="bank@1",outcome="ok",traffic="live"} 1.0' in metrics
    (line,) = [line for line in caplog.messages if '"event": "request"' in line]
    assert key.id in line
    assert "hello" not in line
