"""The endpoint over real HTTP, mostly through the official client, with an engine that needs no model."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from endpoint import Endpoint, endpoint, publish
from other_pythons import find_python
from rankloom.gateway.keys import KeyFile
from rankloom.gateway.retries import ATTEMPTS
from rankloom.registry import Registry

SAY = {"model": "bank", "messages": [{"role": "user", "content": "hi"}]}
COMPLETE = {"model": "bank", "prompt": "hi"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with endpoint(tmp_path_factory.mktemp("endpoint"), broken=["faq@1"], limits={"max_tokens": 200}) as made:
        yield made


def test_chat_through_the_official_client(shared: Endpoint) -> None:
    client = shared.client()
    raw = client.chat.completions.with_raw_response.create(**SAY, n=2, logprobs=True, top_logprobs=3)  # type: ignore[call-overload]
    answer = raw.parse()
    text = "bank@1|user=hi;|"
    assert [choice.message.content for choice in answer.choices] == [text, text]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert answer.choices[0].message.role == "assistant"
    content = answer.choices[1].logprobs.content
    assert "".join(token.token for token in content) == text
    assert (content[0].logprob, content[0].bytes, len(content[0].top_logprobs)) == (-0.5, [98], 3)
    assert (answer.object, answer.model) == ("chat.completion", "bank")
    assert answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (8, 32, 40)
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert (raw.headers["x-rankloom-adapter"], raw.headers["x-rankloom-version"]) == ("bank", "1")


def test_chat_in_a_stream(shared: Endpoint) -> None:
    stream = shared.client().chat.completions.create(**SAY, stream=True, n=2, stream_options={"include_usage": True})  # type: ignore[call-overload]
    *chunks, last = list(stream)
    texts = ["", ""]
    for chunk in chunks:
        assert chunk.object == "chat.completion.chunk"
        assert chunk.id == last.id
        for choice in chunk.choices:
            first = not texts[choice.index]
            assert choice.delta.role == ("assistant" if first else None)
            texts[choice.index] += choice.delta.content
    assert texts == ["bank@1|user=hi;|"] * 2
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop", "stop"]
    assert (last.choices, last.usage.total_tokens) == ([], 40)


def test_completions_of_several_prompts(shared: Endpoint) -> None:
    client = shared.client()
    answer = client.completions.create(model="org/base", prompt=["one", "two"], n=2, logprobs=1)
    assert [c.text for c in answer.choices] == ["base|one|", "base|one|", "base|two|", "base|two|"]
    logprobs = answer.choices[2].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (list("base|two|"), list(range(9)))
    assert (logprobs.token_logprobs, logprobs.top_logprobs) == ([-0.5] * 9, [{token: -0.5} for token in "base|two|"])
    assert (answer.usage and answer.usage.prompt_tokens, answer.object) == (6, "text_completion")
    assert client.completions.create(model="bank@2", prompt=[104, 105]).choices[0].text == "bank@2|hi|"
    assert client.completions.create(model="bank@latest", prompt=[[104], [105]]).choices[1].text == "bank@2|i|"
    chunks = list(client.completions.create(model="bank", prompt="hi", stream=True, max_tokens=3))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ban"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert client.completions.create(model="bank", prompt="x" * 50).usage.completion_tokens == 16  # type: ignore[union-attr]


def test_a_completion_begins_with_its_prompt(shared: Endpoint) -> None:
    client = shared.client()
    asked: dict[str, Any] = {"model": "bank", "echo": True, "max_tokens": 2}
    answer = client.completions.create(**asked, prompt=["hi", "you"], n=2, logprobs=1)
    assert [c.text for c in answer.choices] == ["hiba", "hiba", "youba", "youba"]
    logprobs = answer.choices[3].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (list("youba"), [0, 1, 2, 3, 4])
    assert logprobs.token_logprobs == [None, -0.25, -0.25, -0.5, -0.5]
    assert logprobs.top_logprobs == [None, {"o": -0.25}, {"u": -0.25}, {"b": -0.5}, {"a": -0.5}]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 8)  # type: ignore[union-attr]
    chunks = list(client.completions.create(**asked, prompt=[121, 111, 117], logprobs=1, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "youba"
    streamed = [chunk.choices[0].logprobs.to_dict() for chunk in chunks if chunk.choices[0].logprobs]
    for name, values in logprobs.to_dict().items():
        assert [value for each in streamed for value in each[name]] == values  # type: ignore[attr-defined]
    (choice,) = client.completions.create(**asked, prompt="you").choices
    assert (choice.text, choice.logprobs) == ("youba", None)


def test_a_prompt_alone_is_scored(shared: Endpoint) -> None:
    client = shared.client()
    asked: dict[str, Any] = {"model": "bank@2", "prompt": [[104, 105], [97]], "max_tokens": 0}
    answer = client.completions.create(**asked, echo=True, logprobs=0)
    assert [(c.text, c.finish_reason) for c in answer.choices] == [("hi", "length"), ("a", "length")]
    assert [c.logprobs.token_logprobs for c in answer.choices] == [[None, -0.25], [None]]  # type: ignore[union-attr]
    assert answer.choices[0].logprobs.top_logprobs == [None, {}]  # type: ignore[union-attr]
    assert answer.usage.completion_tokens == 0  # type: ignore[union-attr]
    assert [c.text for c in client.completions.create(**asked, echo=True).choices] == ["hi", "a"]
    assert [c.text for c in client.completions.create(**asked).choices] == ["", ""]
    whole = client.completions.create(model="bank", prompt=[97] * 256, max_tokens=0, echo=True)
    assert len(whole.choices[0].text) == 256
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="bank", prompt=[97] * 256, max_tokens=1, echo=True)


def test_a_choice_is_constrained(shared: Endpoint) -> None:
    body = {"structured_outputs": {"choice": ["card_lost", "transfer"]}}
    answer = shared.client().chat.completions.create(**SAY, extra_body=body)  # type: ignore[call-overload]
    assert answer.choices[0].message.content == "transfer"


def test_a_schema_is_constrained(shared: Endpoint) -> None:
    class Ticket(pydantic.BaseModel):
        topic: Literal["card", "parcel"]
        urgent: bool

    answer = shared.client().chat.completions.parse(**SAY, response_format=Ticket)
    assert answer.choices[0].message.parsed == Ticket(topic="card", urgent=True)


def test_models_are_listed_and_described(shared: Endpoint) -> None:
    client = shared.client()
    assert {"org/base", "bank", "faq"} == {model.id for model in client.models.list()}
    model = client.models.retrieve("bank@2")
    assert (model.id, model.to_dict()["root"], model.to_dict()["max_model_len"]) == ("bank@2", "bank@2", 256)
    assert client.models.retrieve("org/base").id == "org/base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("bank@9")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("bnk", "`bank`"), ("alien", ""), ("../bank", "`bank`"), ("/etc/passwd", ""), ("bank\0", ""), ("base@1", ""),
        ("", ""), ("bank@../../x", ""), ("ü" * 500, ""),
    ],
)  # fmt: skip
def test_unknown_models_are_404_with_near_names(shared: Endpoint, name: str, near: str) -> None:
    for make in (
        lambda: shared.client().chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}]),
        lambda: shared.client().completions.create(model=name, prompt="hi", stream=True),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            make()
        error: Any = caught.value.body
        assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "invalid_request_error")
        assert near in error["message"]


BAD: list[tuple[Any, str, str | None]] = [
    ({"messages": []}, "messages: ", "messages"),
    ({"messages": "hi"}, "messages: ", "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: ", "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content: required", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0", "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "must end with the user", None),
    ({"max_tokens": 0}, "max_tokens: ", "max_tokens"),
    ({"max_tokens": -1}, "max_tokens: ", "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens: ", "max_tokens"),
    ({"max_tokens": 5.5}, "max_tokens: ", "max_tokens"),
    ({"max_tokens": True}, "max_tokens: ", "max_tokens"),
    ({"max_tokens": 201}, "max_tokens 201 is above 200", "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens: ", "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "not both", "max_tokens"),
    ({"temperature": -0.1}, "temperature: ", "temperature"),
    ({"temperature": float("nan")}, "temperature: ", "temperature"),
    ({"temperature": 1e309}, "temperature: ", "temperature"),
    ({"top_p": -0.1}, "top_p: ", "top_p"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty: ", "repetition_penalty"),
    ({"n": 0}, "n: ", "n"),
    ({"n": 17}, "17 completions in one request, above 16", "n"),
    ({"seed": -(2**63) - 1}, "seed: ", "seed"),
    ({"seed": 2**63}, "seed: ", "seed"),
    ({"stop": ["a"] * 65}, "stop: at most 64 (given 65)", "stop"),
    ({"stop": ["a", ""]}, "stop.1: at least 1 character", "stop"),
    ({"stop": [str(n) + "s" * 200 for n in range(30)]}, "stop: at most 4096 characters in all", "stop"),
    ({"top_logprobs": 2}, "needs logprobs", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: ", "top_logprobs"),
    ({"logit_bias": {"5": 1.0}}, "logit_bias: ", "logit_bias"),
    ({"tools": [{"type": "function"}]}, "tools.0.function: required", "tools"),
    ({"response_format": {"type": "yaml"}}, "response_format: expected", "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "b" * 65_536}}}},
        "at most 65536 characters",
        "response_format",
    ),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "not both",
        "structured_outputs",
    ),
    (
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs: exactly one of",
        "structured_outputs",
    ),
    ({"structured_outputs": {}}, "structured_outputs: exactly one of", "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice: ", "structured_outputs"),
    ({"temprature": 1}, "temprature: unknown key; did you mean temperature?", "temprature"),
    ({"model": 5}, "model: ", "model"),
    ({"model": "x" * 513}, "model: ", "model"),
    ({"user": "u" * 513}, "user: ", "user"),
]


@pytest.mark.parametrize(("change", "message", "param"), BAD, ids=lambda v: str(v)[:40])
def test_what_is_wrong_is_named_in_openais_shape(
    shared: Endpoint, change: dict[str, Any], message: str, param: str | None
) -> None:
    answer = shared.post("/v1/chat/completions", SAY | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b'{"model": "\xff"}',
        b'{"model": "\\ud800", "prompt": "x"}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"model": "bank", "prompt": "\\ud800"}', b'{"model": 1e999}', b"\0",
    ],
    ids=range(14),
)  # fmt: skip
def test_bodies_that_are_no_request(shared: Endpoint, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter"):
        answer = shared.post(path, body)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert shared.post("/v1/completions", COMPLETE, headers={"content-type": "text/plain"}).status_code == 400


def test_a_prompt_too_long_is_told_with_openais_code(shared: Endpoint) -> None:
    for body in (
        {"messages": [{"role": "user", "content": "x" * 300}]},
        {"messages": [{"role": "user", "content": "x" * 100}], "max_tokens": 200},
    ):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens") as caught:
            shared.client().chat.completions.create(model="bank", **body)  # type: ignore[call-overload]
        assert caught.value.code == "context_length_exceeded"


def test_a_body_too_large_is_not_read(tmp_path: Path) -> None:
    with endpoint(tmp_path, limits={"body_bytes": 2000}) as made:
        assert made.post("/v1/completions", COMPLETE | {"prompt": "x" * 3000}).status_code == 413
        parts = (b'{"model": "bank", "prompt": "' + b"x" * 1000 for _ in range(3))  # chunked: no length is told
        answer = made.http.post("/v1/completions", content=parts, headers={"content-type": "application/json"})
        assert (answer.status_code, "2000 bytes" in answer.json()["error"]["message"]) == (413, True)
        assert answer.json()["error"]["code"] == "body_too_large"
        assert made.post("/v1/completions", b"{").status_code == 400
        assert made.post("/v1/completions", COMPLETE).status_code == 200
        refused = made.http.get("/metrics").text
        assert 'rankloom_refused_total{status="413"} 2.0' in refused
        assert 'rankloom_refused_total{status="400"} 1.0' in refused


def test_an_adapter_that_is_refused_is_told_why(shared: Endpoint) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="faq@1 does nothing") as caught:
        shared.client().completions.create(model="faq", prompt="hi")
    assert caught.value.code == "adapter_refused"
    assert shared.post("/v1/completions", COMPLETE).status_code == 200  # the others go on


def test_overload_and_bugs(shared: Endpoint) -> None:
    answer = shared.post("/v1/completions", COMPLETE | {"prompt": "overload"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert answer.json()["error"]["code"] == "overloaded"
    answer = shared.post("/v1/completions", COMPLETE | {"prompt": "a bug"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer.text
    assert shared.http.get("/v1/nothing").json()["error"]["message"] == "Not Found"
    assert shared.http.get("/v1/completions").status_code == 405


def test_a_client_that_goes_ends_its_request(shared: Endpoint) -> None:
    engine = shared.replicas.engine
    with shared.client().completions.create(model="bank", prompt="forever", max_tokens=200, stream=True, n=2) as stream:
        next(iter(stream))
        assert len(engine.under_way) == 2
    shared.settled()
    before = len(engine.cancelled)
    with socket.create_connection(("127.0.0.1", int(shared.url.rpartition(":")[2]))) as raw:
        body = json.dumps(COMPLETE | {"prompt": "forever", "max_tokens": 200, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert raw.recv(100).startswith(b"HTTP/1.1 200")
    shared.settled()
    assert len(engine.cancelled) == before + 1


def test_too_many_at_once_are_refused(tmp_path: Path) -> None:
    with endpoint(tmp_path, limits={"in_flight": 2}) as made:
        ask = {"model": "bank", "prompt": "forever", "max_tokens": 200, "stream": True}
        with made.client().completions.create(**ask) as one, made.client().completions.create(**ask) as two:  # type: ignore[call-overload]
            next(iter(one))
            next(iter(two))
            answer = made.post("/v1/completions", COMPLETE)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        made.settled()
        assert made.post("/v1/completions", COMPLETE).status_code == 200


def test_a_lost_replica_is_replaced_until_something_was_answered(tmp_path: Path) -> None:
    with endpoint(tmp_path) as made:
        made.replicas.lose = [0, 0]
        assert made.client().completions.create(model="bank", prompt="hi").choices[0].text == "bank@1|hi|"
        made.replicas.lose = [0]
        stream = made.client().completions.create(model="bank", prompt="hi", stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "bank@1|hi|"
        made.replicas.lose = [2]  # in its midst, but nobody has seen it
        answer = made.client().completions.create(model="bank", prompt="slow", max_tokens=9)
        assert answer.choices[0].text == "bank@1|sl"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 9
        made.replicas.lose = [2]
        chunks = iter(made.client().completions.create(model="bank", prompt="slow", stream=True))
        assert next(chunks).choices[0].text == "b"
        with pytest.raises(openai.APIError, match="replica that wrote this answer was lost") as caught:
            list(chunks)
        assert caught.value.code == "replica_lost"
        for lost_after in (0, 2):  # before and after the first tokens
            begun, made.replicas.lose = made.replicas.begun, [lost_after] * 9
            assert made.post("/v1/completions", COMPLETE | {"prompt": "slow"}).status_code == 503
            assert made.replicas.begun - begun == ATTEMPTS
        made.replicas.lose = []
        made.settled()


def test_an_adapter_is_given_a_name_and_loses_it(tmp_path: Path) -> None:
    with endpoint(tmp_path, adapters=["bank"], broken=["faq@1"]) as made:
        assert made.post("/v1/completions", COMPLETE | {"model": "mine"}).status_code == 404
        loaded = made.post("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "bank@2"})
        assert (loaded.status_code, loaded.json()) == (200, {"loaded": "mine", "adapter": "bank@2"})
        assert made.replicas.engine.pinned == ["bank@2"]
        assert made.client().completions.create(model="mine", prompt="hi").choices[0].text == "bank@2|hi|"
        assert "mine" in {model.id for model in made.client().models.list()}
        for name, ref, status, why in (
            ("again", "faq", 422, "faq@1 does nothing"),
            ("again", "alien", 422, "not on org/base"),
            ("again", "nope", 404, "no adapter 'nope'"),
            ("again", "../../etc/passwd", 400, "adapter name"),
            ("again", "bank@9", 404, "no version 9"),
            ("bank", "faq", 400, "has a meaning"),
            ("base", "faq", 400, "has a meaning"),
            ("../x", "bank@1", 400, "lora_name"),
            ("x\0y", "bank@1", 400, "lora_name"),
        ):
            answer = made.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": ref})
            assert (answer.status_code, why in answer.json()["error"]["message"]) == (status, True), answer.text
        assert made.post("/v1/unload_lora_adapter", {"lora_name": "mine"}).status_code == 200
        assert made.post("/v1/completions", COMPLETE | {"model": "mine"}).status_code == 404
        for name in ("mine", "bank"):
            assert made.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code == 404


def test_what_is_published_and_promoted_is_served_without_a_restart(tmp_path: Path) -> None:
    with endpoint(tmp_path) as made:
        client = made.client()
        assert client.completions.create(model="bank", prompt="hi").choices[0].text.startswith("bank@1")
        made.registry.promote("bank@2")
        publish(made.registry, "fresh", made.work)
        time.sleep(0.5)
        assert client.completions.create(model="fresh", prompt="hi").choices[0].text == "fresh@1|hi|"
        assert client.completions.create(model="bank", prompt="hi").choices[0].text.startswith("bank@2")


def test_keys(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    (user, _), (boss, _) = file.create("ann"), file.create("boss", "admin")
    few, _ = file.create("few", requests_per_minute=2)
    thrifty, kept = file.create("thrifty", tokens_per_minute=15)
    with endpoint(tmp_path, auth={"keys": str(file.path)}, host="127.0.0.1") as made:
        for key in ("wrong", user[:-1] + "x", ""):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            answer = made.post("/v1/completions", COMPLETE, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert made.http.get(path).status_code == 401
        assert made.http.get("/healthz").status_code == made.http.get("/readyz").status_code == 200
        assert made.client(user).completions.create(model="bank", prompt="hi").choices[0].text == "bank@1|hi|"
        with pytest.raises(openai.PermissionDeniedError, match="admin's key"):
            made.client(user).post("/load_lora_adapter", body={"lora_name": "mine", "lora_path": "faq"}, cast_to=object)
        made.client(boss).post("/load_lora_adapter", body={"lora_name": "mine", "lora_path": "faq"}, cast_to=object)
        for _ in range(2):
            made.client(few).completions.create(model="bank", prompt="hi")
        with pytest.raises(openai.RateLimitError, match="2 requests a minute") as caught:
            made.client(few).completions.create(model="bank", prompt="hi")
        assert 25 <= int(caught.value.response.headers["retry-after"]) <= 30
        for _ in range(2):  # the first takes 12 of 15, the second is let in and overdraws
            made.client(thrifty).completions.create(model="bank", prompt="hi")
        with pytest.raises(openai.RateLimitError, match="15 tokens a minute"):
            made.client(thrifty).completions.create(model="bank", prompt="hi")
        file.revoke(kept.id)
        with pytest.raises(openai.AuthenticationError):
            made.client(thrifty).models.list()


@pytest.mark.parametrize("share", [False, True])
def test_each_keys_prompts_are_its_own_unless_they_are_shared(tmp_path: Path, share: bool) -> None:
    file = KeyFile(tmp_path / "keys.json")
    keys = [file.create("ann"), file.create("ben"), file.create("ann")]
    with endpoint(tmp_path, auth={"keys": str(file.path), "share_prefixes": share}) as made:
        found, run = [], made.replicas.run
        made.gateway._replicas.run = lambda job: (found.append(job.tenant), run(job))[1]  # type: ignore[method-assign,func-returns-value]
        for key, _ in keys:
            made.client(key).completions.create(model="bank", prompt="hi")
    assert found == [None if share else kept.id for _, kept in keys]


def test_without_keys_only_this_machine_is_answered(shared: Endpoint, tmp_path: Path) -> None:
    for headers in (
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "evil.example:8000"},
        {"x-forwarded-for": "10.0.0.1"},
    ):
        answer = shared.http.get("/v1/models", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "keys_required")
    for host in ("localhost", "127.0.0.1:80", "[::1]:80", "[::1]"):
        assert shared.http.get("/v1/models", headers={"host": host}).status_code == 200
    with endpoint(tmp_path, auth={"anonymous": True}) as made:
        elsewhere = {"x-forwarded-for": "10.0.0.1"}
        assert made.post("/v1/completions", COMPLETE, headers=elsewhere).status_code == 200
        load = {"lora_name": "mine", "lora_path": "faq"}
        assert made.post("/v1/load_lora_adapter", load, headers=elsewhere).status_code == 403
        assert made.post("/v1/load_lora_adapter", load).status_code == 200


def test_the_log_has_no_prompt_and_no_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key, kept = file.create("ann")
    with caplog.at_level(logging.INFO), endpoint(tmp_path, auth={"keys": str(file.path)}) as made:
        bearer = {"authorization": f"Bearer {key}", "x-request-id": "mine-1"}
        made.post("/v1/completions", COMPLETE | {"prompt": "my secret"}, headers=bearer)
        made.settled()
        made.post("/v1/completions", COMPLETE | {"prompt": "secret bug"}, headers=bearer)
        made.settled()
    lines = [json.loads(r.message) for r in caplog.records if r.message.startswith("{")]
    line = next(line for line in lines if line["event"] == "request")
    assert (line["request_id"], line["key"], line["adapter"], line["outcome"]) == ("mine-1", kept.id, "bank@1", "ok")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (9, 16)
    everything = caplog.text
    assert "failure" in everything
    assert "gateway.py" in everything  # where it failed
    assert "secret" not in everything
    assert key.split("-", 2)[2] not in everything


def test_metrics(tmp_path: Path) -> None:
    with endpoint(tmp_path, broken=["faq@1"]) as made:
        made.post("/v1/completions", COMPLETE)
        made.post("/v1/completions", COMPLETE | {"model": "org/base"})
        made.post("/v1/completions", COMPLETE | {"model": "faq"})
        made.post("/v1/completions", COMPLETE | {"prompt": "bug"})
        made.settled()
        text = made.http.get("/metrics").text
    for line in (
        'rankloom_requests_total{adapter="bank@1",outcome="ok",traffic="live"} 1.0',
        'rankloom_requests_total{adapter="base",outcome="ok",traffic="live"} 1.0',
        'rankloom_requests_total{adapter="faq@1",outcome="client error",traffic="live"} 1.0',
        'rankloom_requests_total{adapter="bank@1",outcome="server error",traffic="live"} 1.0',
        'rankloom_tokens_total{adapter="bank@1",kind="completion",traffic="live"} 10.0',
        'rankloom_tokens_total{adapter="bank@1",kind="prompt",traffic="live"} 2.0',
        'rankloom_first_token_seconds_count{adapter="bank@1",traffic="live"} 1.0',
        "rankloom_in_flight 0.0",
    ):
        assert line in text


def ask(made: Endpoint, model: str, *, count: int = 1, **more: Any) -> list[str]:
    """The adapters that answered."""
    answers = [made.post("/v1/completions", COMPLETE | {"model": model} | more) for _ in range(count)]
    assert {answer.status_code for answer in answers} == {200}, answers[0].text
    return [answer.json()["choices"][0]["text"].partition("|")[0] for answer in answers]


def test_routes_decide(tmp_path: Path) -> None:
    routes = {
        "safe": {"to": "faq", "fallback": ["nope", "bank@2", "base"]},
        "split": {"split": {"bank@1": 1, "base": 1}, "sticky": True},
        "rule": {"to": "bank", "rules": [{"header": "X-Tier", "equals": "gold", "to": "bank@2"}]},
        "twice": {"to": "bank", "shadow": {"to": "bank@2"}},
        "broken": {"to": "faq"},
    }
    with endpoint(tmp_path, broken=["faq@1"], adapters=["bank@1"], routes=routes) as made:
        assert ask(made, "safe") == ["bank@2"]
        assert set(ask(made, "split", count=20)) == {"bank@1", "base"}
        assert len(set(ask(made, "split", count=20, user="ann"))) == 1
        assert ask(made, "rule") == ["bank@1"]
        answer = made.post("/v1/completions", COMPLETE | {"model": "rule"}, headers={"x-tier": "gold"})
        assert (answer.headers["x-rankloom-adapter"], answer.headers["x-rankloom-version"]) == ("bank", "2")
        assert made.post("/v1/completions", COMPLETE | {"model": "broken"}).status_code == 422
        assert made.post("/v1/completions", COMPLETE | {"model": "faq"}).status_code == 404  # in routes alone
        assert ask(made, "twice") == ["bank@1"]
        made.settled()
        shadowed = 'rankloom_requests_total{adapter="bank@2",outcome="ok",traffic="shadow"} 1.0'
        assert shadowed in made.http.get("/metrics").text
        assert {"safe", "split", "rule", "twice", "broken"} < {m.id for m in made.client().models.list()}


def canary(**judge: Any) -> dict[str, Any]:
    sides = {"adapter": "bank", "share": 0.5, "judge": {"min_requests": 5} | judge}
    return {"front": {"canary": sides, "sticky": True}}


def test_a_canary_that_fails_is_rolled_back_for_good(tmp_path: Path) -> None:
    with endpoint(tmp_path, broken=["bank@2"], routes=canary()) as made:
        assert set(ask(made, "front", count=5)) == {"bank@1"}  # no canary yet
        made.registry.promote("bank@2", alias="canary")
        time.sleep(0.5)
        statuses = [made.post("/v1/completions", COMPLETE | {"model": "front"}).status_code for _ in range(60)]
        assert 5 <= statuses.count(422) < 20  # until both had five, and no more
        made.settled()
        assert set(ask(made, "front", count=20)) == {"bank@1"}
        assert made.registry.aliases("bank") == {"champion": 1, "canary": 1}
        time.sleep(0.5)
        made.registry.promote("bank@2", alias="canary")  # a person tries it again
        time.sleep(0.5)
        assert 422 in [made.post("/v1/completions", COMPLETE | {"model": "front"}).status_code for _ in range(20)]


def test_a_canary_that_does_well_is_promoted(tmp_path: Path) -> None:
    with endpoint(tmp_path, routes=canary(promote_after=8, latency_ratio=1000)) as made:
        made.registry.promote("bank@2", alias="canary")
        time.sleep(0.5)
        assert set(ask(made, "front", count=60)) == {"bank@1", "bank@2"}
        made.settled()
        time.sleep(0.3)
        assert made.registry.aliases("bank") == {"champion": 2, "canary": 2}
        assert set(ask(made, "front", count=20)) == {"bank@2"}


def test_a_canary_does_not_end_for_what_clients_send(tmp_path: Path) -> None:
    with endpoint(tmp_path, routes=canary(latency_ratio=5)) as made:
        made.replicas.engine.pace_s = {"bank@1": 0.005, "bank@2": 0.005}
        made.registry.promote("bank@2", alias="canary")
        time.sleep(0.5)
        users: dict[str, list[str]] = {"1": [], "2": []}
        for i in range(30):  # a client learns who is on which side, and fails where the candidate is
            body = COMPLETE | {"model": "front", "user": f"user {i}", "max_tokens": 2}
            users[made.post("/v1/completions", body).headers["x-rankloom-version"]].append(f"user {i}")
        for user in users["2"]:
            body = COMPLETE | {"model": "front", "user": user, "prompt": "bug"}
            assert made.post("/v1/completions", body).status_code == 500
        assert len(users["2"]) > 5
        made.settled()
        time.sleep(0.3)
        assert made.registry.aliases("bank") == {"champion": 1, "canary": 2}


def until_rolled_back(made: Endpoint) -> Iterator[None]:
    """Each turn of a loop that lasts until `bank`'s canary is its old version again."""
    deadline = time.monotonic() + 60
    while made.registry.aliases("bank")["canary"] == 2:
        assert time.monotonic() < deadline
        yield


def test_a_canary_that_is_slow_is_rolled_back(tmp_path: Path) -> None:
    with endpoint(tmp_path, routes=canary(latency_ratio=3)) as made:
        made.replicas.engine.pace_s = {"bank@1": 0.001, "bank@2": 0.02}
        made.registry.promote("bank@2", alias="canary")
        for _ in until_rolled_back(made):
            made.post("/v1/completions", COMPLETE | {"model": "front", "max_tokens": 1})
        made.settled()
        assert 'adapter="bank@2",outcome="ok",traffic="pace"' in made.http.get("/metrics").text


def test_a_canary_that_can_not_do_the_endpoints_own_requests_is_rolled_back(tmp_path: Path) -> None:
    for error in (ZeroDivisionError, TimeoutError):
        with endpoint(tmp_path, routes=canary()) as made:
            made.replicas.engine.fails = {"bank@2": error}
            made.registry.promote("bank@2", alias="canary")
            for _ in until_rolled_back(made):
                made.post("/v1/completions", COMPLETE | {"model": "front"})
            made.settled()


def test_a_canary_that_nobody_waits_for_is_timed(tmp_path: Path) -> None:
    with endpoint(tmp_path, routes=canary(latency_ratio=3)) as made:
        made.replicas.engine.pace_s = {"bank@1": 0.001, "bank@2": 0.05}
        made.registry.promote("bank@2", alias="canary")
        for _ in until_rolled_back(made):
            body = COMPLETE | {"model": "front", "prompt": "forever", "stream": True, "max_tokens": 200}
            with made.http.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_bytes())


def test_a_sticky_user_stays_where_he_was_after_a_restart(tmp_path: Path) -> None:
    routes = {"split": {"split": {"bank@1": 1, "bank@2": 1}, "sticky": True}}
    seen = []
    for _ in range(2):
        with endpoint(tmp_path, routes=routes) as made:
            seen.append([ask(made, "split", user=f"user {i}") for i in range(20)])
    assert seen[0] == seen[1]
    assert len({*map(str, seen[0])}) == 2
    assert made.registry.secret() == Registry(made.registry.root).secret()


def test_a_refusal_tells_no_places_of_this_machine(tmp_path: Path) -> None:
    with endpoint(tmp_path, broken=["bank@1"]) as made:
        made.replicas.engine.reason = f"in {made.registry.root}/bank/1 is damaged"
        answer = made.post("/v1/completions", COMPLETE)
        assert answer.status_code == 422
        assert "bank@1 in the registry/bank/1 is damaged" in answer.json()["error"]["message"]


def test_a_keys_traffic_is_not_told_to_others(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    (user, _), (boss, _) = file.create("ann"), file.create("boss", "admin")
    with endpoint(tmp_path, auth={"keys": str(file.path)}) as made:
        for key, status in ((user, 403), (boss, 200)):
            bearer = {"authorization": f"Bearer {key}"}
            assert made.http.get("/metrics", headers=bearer).status_code == status
            state = made.http.get("/console/state", headers=bearer).json()
            assert ("requests" in state) == ("completion_tokens" in state) == (status == 200)
            assert {"base", "context", "models"} <= state.keys()


def test_a_key_leaves_room_for_the_next(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    (ann, _), (ben, _) = file.create("ann"), file.create("ben")
    with endpoint(tmp_path, auth={"keys": str(file.path)}, limits={"in_flight": 6}) as made:
        made.replicas.engine.context = 5000
        streams = [forever(made, ann) for _ in range(3)]
        with pytest.raises(openai.RateLimitError, match="3 requests in flight"):
            forever(made, ann)
        streams.append(forever(made, ben))
        with pytest.raises(openai.RateLimitError):
            forever(made, ann)
        streams.append(forever(made, ben))
        with pytest.raises(openai.RateLimitError, match="2 requests in flight"):
            forever(made, ben)
        for stream in streams:
            stream.close()
        made.settled()
        forever(made, ann).close()


def forever(made: Endpoint, key: str) -> Any:
    asked = made.client(key).completions.create(model="bank", prompt="forever", max_tokens=4000, stream=True)
    next(iter(asked))
    return asked


def test_the_app_says_of_itself_what_it_takes(shared: Endpoint) -> None:
    document = shared.http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics"} <= set(document["paths"])
    assert {"messages", "model", "stream"} <= set(document["components"]["schemas"]["ChatRequest"]["properties"])


def test_the_console_is_one_page_that_asks_nobody_else(shared: Endpoint) -> None:
    page = shared.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    parts = [shared.http.get(f"/console.{kind}") for kind in ("js", "css")]
    assert [part.status_code for part in parts] == [200, 200]
    assert not [part for part in (page, *parts) if "http://" in part.text or "https://" in part.text]
    assert shared.http.get("/console.py").status_code == 400
    before = shared.http.get("/console/state").json()
    shared.post("/v1/completions", COMPLETE)
    after = shared.http.get("/console/state").json()
    assert after["completion_tokens"] - before["completion_tokens"] == 10
    assert after["requests"] - before["requests"] == 1
    bank = next(model for model in after["models"] if model["id"] == "bank")
    assert (bank["ref"], bank["method"], bank["rows"]) == ("bank@1", "lora", [])


@pytest.mark.slow
def test_litellm_and_langchain(tmp_path: Path) -> None:
    python = find_python("litellm", "langchain_openai")
    script = Path(__file__).parents[2] / "support" / "other_clients.py"
    file = KeyFile(tmp_path / "keys.json")
    (good, _), (once, _) = file.create("good"), file.create("once", requests_per_minute=1)
    with endpoint(tmp_path, auth={"keys": str(file.path)}) as made:
        made.client(once).completions.create(model="bank@2", prompt="hi")
        asked = [python, script, made.url, good, once]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for client in ("litellm", "langchain"):
        assert found[client] == "bank@2|user=hi;|"
        assert found[f"{client} in a stream"] == "bank@1|user=hi;|"
    assert found["missing"][:2] == ["NotFoundError", 404]
    assert "`bank`" in found["missing"][2]
    assert found["overload"][:2] == ["ServiceUnavailableError", 503]
    assert found["used up"][:2] == ["RateLimitError", 429]
