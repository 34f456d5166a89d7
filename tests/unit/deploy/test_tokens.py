"""`/tokenize` and `/detokenize`, as vLLM has them, over real HTTP: by the engine without a model, and by a real one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chat_templates import write_base
from endpoint import Endpoint, endpoint, listening
from one_engine import OneEngine
from rankloom.config import parse
from rankloom.config.serve import ServeConfig
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.keys import KeyFile
from rankloom.registry import Registry
from served import load

SAY = [{"role": "user", "content": "What is the weather?"}]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[tuple[Endpoint, Any]]:
    """An endpoint on a tiny model with Hermes's template, and its tokenizer."""
    folder = tmp_path_factory.mktemp("real")
    base = load(write_base(tiny_llama, folder / "hermes", "hermes"))
    replicas, registry = OneEngine(base, Registry(folder / "registry")), Registry(folder / "registry")
    gateway = Gateway(parse(ServeConfig, {"base": base.id, "limits": {"context": 300}}), registry, replicas)
    with listening(gateway) as url:
        made = Endpoint(url, gateway, replicas, registry, folder)  # type: ignore[arg-type]
        with made.http:
            yield made, AutoTokenizer.from_pretrained(folder / "hermes")
    asyncio.run(replicas.engine.close())


def test_a_prompts_tokens_are_the_tokenizers(real: tuple[Endpoint, Any]) -> None:
    endpoint, tokenizer = real
    text = "the card, größe <|im_end|>\n"
    answer = endpoint.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert answer == {
        "count": len(ids), "max_model_len": 300, "tokens": ids, "token_strs": tokenizer.convert_ids_to_tokens(ids),
    }  # fmt: skip
    assert endpoint.post("/tokenize", {"prompt": text, "model": "base"}).json()["token_strs"] is None
    assert endpoint.post("/detokenize", {"tokens": ids}).json() == {"prompt": text}
    assert endpoint.post("/tokenize", {"prompt": ""}).json()["count"] == 0


@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_a_conversations_tokens_are_those_that_a_completion_has(real: tuple[Endpoint, Any], tools: Any) -> None:
    endpoint, _ = real
    answer = endpoint.post("/tokenize", {"messages": SAY, "tools": tools}).json()
    asked: dict[str, Any] = {"model": "base", "messages": SAY, "max_tokens": 1} | ({"tools": tools} if tools else {})
    chat = endpoint.client().chat.completions.create(**asked)
    assert chat.usage is not None
    assert answer["count"] == chat.usage.prompt_tokens == len(answer["tokens"])
    text = endpoint.post("/detokenize", {"tokens": answer["tokens"]}).json()["prompt"]
    assert ("get_weather" in text) == bool(tools)
    assert text.endswith("assistant\n")


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/tokenize", {}, 400, "prompt: give either prompt or messages."),
        ("/tokenize", {"prompt": "a", "messages": SAY}, 400, "prompt: give either prompt or messages."),
        ("/tokenize", {"prompt": "a", "tools": [TOOL]}, 400, "tools: only with messages."),
        ("/tokenize", {"messages": SAY, "add_special_tokens": True}, 400, "add_special_tokens: a chat template"),
        ("/tokenize", {"messages": SAY, "add_generation_prompt": False}, 400, "add_generation_prompt: only true"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, 400, "chat_template: not supported; leave it out"),
        ("/tokenize", {"prompt": "a", "model": "bnk"}, 404, "Did you mean `bank`"),
        ("/detokenize", {"tokens": [300]}, 400, "tokens: 300 is outside of the vocabulary of 256"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0: must be greater than or equal to 0"),
        ("/detokenize", {"model": "bank@9", "tokens": [1]}, 404, "bank@9"),
        ("/detokenize", {}, 400, "tokens: required"),
    ],
    ids=str,
)
def test_mistakes_are_named(tmp_path: Path, path: str, body: dict[str, Any], status: int, message: str) -> None:
    with endpoint(tmp_path) as made:
        answer = made.post(path, body)
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text


def test_names_keys_and_limits_are_those_of_completions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    secret, key = keys.create("ann", requests_per_minute=3)
    with endpoint(tmp_path, auth={"keys": str(keys.path)}, routes={"help": {"to": "bank"}}) as made:
        caplog.set_level("INFO", logger="rankloom.gateway")
        headers = {"authorization": f"Bearer {secret}", "x-request-id": "trace-1"}
        assert made.post("/tokenize", {"prompt": "hi"}).status_code == 401
        assert made.post("/tokenize", {}, headers=headers).status_code == 400  # does not count
        for model in ("help", "bank@1", "org/base"):
            answer = made.post("/tokenize", {"model": model, "prompt": "hi"}, headers=headers)
            assert answer.json()["tokens"] == [104, 105]
        assert made.post("/detokenize", {"tokens": [104]}, headers=headers).status_code == 429
        made.settled()
    lines = [line for line in caplog.messages if '"event": "question"' in line]
    assert len(lines) == 3
    assert all('"request_id": "trace-1"' in line and key.id in line and "hi" not in line.split() for line in lines)
