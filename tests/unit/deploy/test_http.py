"""HTTP before the endpoint: methods, paths, the ways to give a key, proxies, and lists of thousands."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from endpoint import Endpoint, endpoint
from rankloom.deploy.responding import encode_json
from rankloom.gateway.keys import KeyFile
from rankloom.gateway.policy import AdapterVersions, Catalogue

COMPLETE = {"model": "bank", "prompt": "hi"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with endpoint(tmp_path_factory.mktemp("endpoint")) as made:
        yield made


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/readyz", "/v1/models", "/v1/models/bank", "/metrics", "/console.js"]
)
def test_head_is_get_without_a_body(shared: Endpoint, path: str) -> None:
    asked, whole = shared.http.head(path), shared.http.get(path)
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-type"] == whole.headers["content-type"]
    assert shared.http.head("/v1/completions").status_code == 405
    assert shared.http.head("/v1/nothing").status_code == 404


@pytest.mark.parametrize("path", ["/healthz/", "/v1/models/", "/v1/models/bank/", "/v1/models//", "/metrics/"])
def test_a_slash_at_the_end_means_nothing(shared: Endpoint, path: str) -> None:
    answer = shared.http.get(path)  # redirects are not followed
    assert (answer.status_code, answer.headers["content-type"]) == (
        200,
        shared.http.get(path.rstrip("/")).headers["content-type"],
    )
    assert shared.post("/v1/completions/", COMPLETE).json()["choices"][0]["text"] == "bank@1|hi|"


def test_a_key_may_be_given_as_azure_does_or_as_a_password(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key, _ = file.create("ann")

    def basic(text: str) -> dict[str, str]:
        return {"authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}

    with endpoint(tmp_path, auth={"keys": str(file.path)}) as made:
        empty = {"authorization": "Bearer", "api-key": key}
        given = {"authorization": f"Bearer {key}"}
        for headers in (given, {"api-key": key}, empty, basic(f"ann:{key}"), basic(f":{key}")):
            assert made.http.get("/v1/models", headers=headers).status_code == 200
        for headers in (
            {"api-key": key[:-1]}, basic(f"ann:{key}x"), basic(key), {"authorization": "Basic %%%"}, basic("é:é"),
            {"authorization": "Basic w6k="}, {"authorization": key}, {},
        ):  # fmt: skip
            for path in ("/v1/models", "/v1/models/", "/healthz/../v1/models"):
                answer = made.http.get(path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert made.http.get("/healthz/").status_code == 200


@pytest.mark.parametrize(
    "header", ["X-Real-IP", "X-Forwarded-For", "X-Forwarded-Proto", "Forwarded", "Via", "CF-Connecting-IP"]
)
def test_who_comes_through_a_proxy_is_not_this_machine(shared: Endpoint, header: str) -> None:
    answer = shared.http.get("/v1/models", headers={header: "127.0.0.1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "keys_required")


def test_nginx_as_it_comes_is_known_for_a_proxy(shared: Endpoint) -> None:
    """It sends neither its client's address nor his Host, but HTTP/1.0."""
    host, _, port = shared.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(f"GET /v1/models HTTP/1.0\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        assert b" 403 " in raw.recv(100)


def test_a_request_id_beyond_ascii_is_answered(shared: Endpoint) -> None:
    for name in ("é", "日本", b"\xff\xfe"):
        headers = {"x-request-id": name if isinstance(name, bytes) else name.encode()}
        answer = shared.http.post("/v1/completions", json=COMPLETE, headers=headers)  # type: ignore[arg-type]
        assert answer.status_code == 200
        assert answer.headers["x-request-id"].isascii()


def test_each_request_has_an_id(shared: Endpoint) -> None:
    """Clients show it in their errors, and the log has it."""
    given = shared.http.get("/healthz", headers={"x-request-id": "mine-7"})
    assert given.headers.get_list("x-request-id") == ["mine-7"]
    made = [shared.http.get("/healthz").headers["x-request-id"] for _ in range(2)]
    assert all(made)
    assert made[0] != made[1]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_large_answer_comes_whole(shared: Endpoint, path: str) -> None:
    body = {"model": "bank", "n": 16, "max_tokens": 100, "prompt": "a" * 100, "logprobs": 20}
    if "chat" in path:
        del body["prompt"]
        body |= {"messages": [{"role": "user", "content": "a" * 90}], "logprobs": True, "top_logprobs": 20}
    answer = shared.post(path, body)
    assert "chat" not in path or "content-length" not in answer.headers  # of megabytes, it came in parts
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(16))
    for choice in choices:
        told = choice["logprobs"]
        text = choice["message"]["content"] if "chat" in path else choice["text"]
        tokens = [each["token"] for each in told["content"]] if "chat" in path else told["tokens"]
        assert "".join(tokens) == text
        assert len(text) == 100
        tops = [each["top_logprobs"] for each in told["content"]] if "chat" in path else told["top_logprobs"]
        assert len(tops) == 100
    assert answer.json()["usage"]["completion_tokens"] == 1600


def test_others_have_their_turns_while_a_large_answer_is_encoded() -> None:
    value, turns = {"data": [[0.5] * 1000] * 100}, 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def encode() -> bytes:
        other = asyncio.create_task(take_turns())
        encoded = await encode_json(value)
        other.cancel()
        return encoded

    assert json.loads(asyncio.run(encode())) == value
    assert turns > 5


def test_thousands_of_models_are_listed(tmp_path: Path) -> None:
    with endpoint(tmp_path, refresh_s=600) as made:
        names = tuple(f"adapter-{number}" for number in range(10_000))
        made.gateway.catalogue = Catalogue("org/base", {name: AdapterVersions((1,)) for name in names}, offered=names)
        listed = [model["id"] for model in made.http.get("/v1/models").json()["data"]]
        assert listed == ["org/base", *names]
        assert [model["id"] for model in made.http.get("/console/state").json()["models"]] == listed
        one = made.http.get("/v1/models/adapter-77").json()
        assert (one["id"], one["root"]) == ("adapter-77", "adapter-77@1")
