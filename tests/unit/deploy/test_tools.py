"""Tools through the official client, over real HTTP and a real engine on each family's chat template."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ParsedChatCompletion

from chat_templates import FAMILIES
from endpoint import listening
from family_clients import Clients, ask_at_once
from one_engine import OneEngine
from rankloom.config import parse
from rankloom.config.serve import ServeConfig
from rankloom.gateway.gateway import Gateway
from rankloom.registry import Registry
from served import load


class GetWeather(pydantic.BaseModel):
    """Return the weather of a city."""

    city: Literal["Bern", "Oslo", "Lima"]
    days: int = pydantic.Field(ge=1, le=99)


class Pay(pydantic.BaseModel):
    """Pay an amount."""

    cents: int = pydantic.Field(ge=0, le=500)


TOOLS: list[Any] = [openai.pydantic_function_tool(GetWeather), openai.pydantic_function_tool(Pay)]
KINDS: dict[str, type[pydantic.BaseModel]] = {"GetWeather": GetWeather, "Pay": Pay}
ALLOWED: dict[str, Any] = {"mode": "required", "tools": [{"type": "function", "function": {"name": "Pay"}}]}
SAY: Any = [{"role": "user", "content": "What is the weather in Bern?"}]
SCRIPTS = {
    "hermes": 'I look.\n<tool_call>\n{"name": "Pay", "arguments": {"cents": 5}}\n</tool_call>',
    "qwen3": '<think>Hm.</think>\n\nI look.\n<tool_call>\n{"name": "Pay", "arguments": {"cents": 5}}\n</tool_call>',
    "qwen3_coder": "I look.\n<tool_call>\n<function=Pay>\n<parameter=cents>\n5\n</parameter>\n</function>\n"
    "</tool_call>",
    "llama3": '{"name": "Pay", "parameters": {"cents": 5}}',
    "mistral": '[TOOL_CALLS] [{"name": "Pay", "arguments": {"cents": 5}}]',
    "mistral_named": '[TOOL_CALLS]Pay[ARGS]{"cents": 5}',
    "gpt_oss": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.Pay "
    '<|constrain|>json<|message|>{"cents": 5}',
}
"""Completions with a call, as models of a family write them."""


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Clients]:
    with ExitStack() as stack:
        yield Clients(tmp_path_factory.mktemp("families"), tiny_llama, stack)


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("thinking")])
def test_a_forced_call_comes_in_a_loop_until_it_is_answered(clients: Clients, family: str) -> None:
    chat, messages = clients[family].chat.completions, [*SAY]
    for seed in range(3):
        answer = chat.parse(model="base", messages=messages, tools=TOOLS, tool_choice="required", seed=seed)
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls
        assert len(choice.message.tool_calls) == 1 or FAMILIES[family].several
        turn = {"role": "assistant", "content": choice.message.content, "tool_calls": list[Any]()}
        messages.append(turn)
        for call in choice.message.tool_calls:
            assert isinstance(call.function.parsed_arguments, KINDS[call.function.name])
            function = {"name": call.function.name, "arguments": call.function.arguments}
            turn["tool_calls"].append({"id": call.id, "type": "function", "function": function})
            messages.append({"role": "tool", "tool_call_id": call.id, "content": f"result of {call.id}"})
    last = chat.create(model="base", messages=messages, tools=TOOLS, max_tokens=5, seed=0)
    assert last.usage.prompt_tokens > answer.usage.prompt_tokens  # type: ignore[union-attr]
    none = chat.create(model="base", messages=messages, tools=TOOLS, tool_choice="none", max_tokens=5, seed=0)
    assert none.usage.prompt_tokens < last.usage.prompt_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["hermes", "qwen3_coder", "llama3", "mistral_named", "gpt_oss"])
def test_a_named_tool_is_called_in_a_stream(clients: Clients, family: str) -> None:
    named: Any = {"type": "function", "function": {"name": "Pay"}}
    asked: dict[str, Any] = {"model": "base", "messages": SAY, "tools": TOOLS, "tool_choice": named, "seed": 7}
    with clients[family].chat.completions.stream(**asked) as stream:
        events = list(stream)
        streamed = stream.get_final_completion().choices[0]
    (call,) = streamed.message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Pay)
    parts = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(parts) > 2
    assert "".join(part.arguments_delta for part in parts) == call.function.arguments
    whole = clients[family].chat.completions.create(**asked).choices[0]
    assert whole.message.tool_calls is not None
    assert whole.message.tool_calls[0].function.arguments == call.function.arguments  # type: ignore[union-attr]
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"


def test_only_allowed_tools_are_called(clients: Clients) -> None:
    allowed: Any = {"type": "allowed_tools", "allowed_tools": ALLOWED}
    asked: dict[str, Any] = {"model": "base", "messages": SAY, "tools": TOOLS}
    for seed in range(5):
        answer = clients["hermes"].chat.completions.create(**asked, tool_choice=allowed, seed=seed)
        assert {call.function.name for call in answer.choices[0].message.tool_calls or ()} == {"Pay"}  # type: ignore[union-attr]
    text = clients.write_script("hermes", SCRIPTS["hermes"].replace("Pay", "GetWeather"))
    body = {"structured_outputs": {"grammar": text}}
    allowed["allowed_tools"] = ALLOWED | {"mode": "auto"}
    answer = clients["hermes"].chat.completions.create(**asked, tool_choice=allowed, extra_body=body)
    assert answer.choices[0].message.tool_calls is None
    assert "GetWeather" in (answer.choices[0].message.content or "")


@pytest.mark.parametrize("family", list(SCRIPTS))
def test_strict_tools_are_called_by_their_schemas_or_not_at_all(clients: Clients, family: str) -> None:
    """The random model writes text, or calls that could not be by chance."""
    called, chat = 0, clients[family].chat.completions

    def ask(seed: int) -> ChatCompletion:
        return chat.create(model="base", messages=SAY, tools=TOOLS, max_tokens=1200, seed=seed, temperature=1.2)

    for answer in ask_at_once(ask, 12):
        (choice,) = answer.choices
        if choice.finish_reason != "length":
            for call in choice.message.tool_calls or ():
                KINDS[call.function.name].model_validate_json(call.function.arguments)  # type: ignore[union-attr]
                called += 1
    assert called or family == "llama3"  # whose calls have no token of their own, which is rarely drawn


@pytest.mark.parametrize("family", list(SCRIPTS))
def test_an_answer_is_a_call_or_follows_the_schema(clients: Clients, family: str) -> None:
    class Reply(pydantic.BaseModel):
        text: Literal["yes", "no"]

    kinds, chat = set(), clients[family].chat.completions

    def ask(seed: int) -> ParsedChatCompletion[Reply]:
        return chat.parse(
            model="base", messages=SAY, tools=TOOLS, response_format=Reply, seed=seed, temperature=1.5, max_tokens=1500
        )

    for answer in ask_at_once(ask, 10):
        message = answer.choices[0].message
        assert isinstance(message.parsed, Reply) != bool(message.tool_calls)
        kinds.add(message.parsed is None)
    assert len(kinds) == 2


@pytest.mark.parametrize("family", SCRIPTS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_the_models_own_is_read(clients: Clients, family: str, stream: bool) -> None:
    body = {"structured_outputs": {"grammar": clients.write_script(family, SCRIPTS[family])}}
    asked: dict[str, Any] = {"model": "base", "messages": SAY, "tools": TOOLS, "extra_body": body}
    if stream:
        with clients[family].chat.completions.stream(**asked) as events:
            (choice,) = events.get_final_completion().choices
    else:
        (choice,) = clients[family].chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content or None) == ("I look." if "I look" in SCRIPTS[family] else None)
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls or ()] == [{"cents": 5}]
    assert getattr(choice.message, "reasoning_content", None) == ("Hm." if family in ("qwen3", "gpt_oss") else None)


def test_only_one_call_comes_where_no_others_are_wanted(clients: Clients) -> None:
    calls = "".join(
        f'<tool_call>\n{{"name": "Pay", "arguments": {{"cents": {cents}}}}}\n</tool_call>\n' for cents in (5, 6)
    )
    grammar = clients.write_script("hermes", calls)
    asked: dict[str, Any] = {"model": "base", "messages": SAY, "tools": TOOLS}
    for parallel, expected in ((None, [5, 6]), (True, [5, 6]), (False, [5])):
        body = {"structured_outputs": {"grammar": grammar}, "parallel_tool_calls": parallel}
        (choice,) = clients["hermes"].chat.completions.create(**asked, extra_body=body).choices
        assert [json.loads(call.function.arguments)["cents"] for call in choice.message.tool_calls or ()] == expected


@pytest.mark.parametrize("family", ["thinking", "gpt_oss", "qwen3"])
def test_a_schema_is_of_the_answer_after_the_thinking(clients: Clients, family: str) -> None:
    thought, chat = 0, clients[family].chat.completions

    def ask(seed: int) -> ParsedChatCompletion[GetWeather]:
        return chat.parse(model="base", messages=SAY, response_format=GetWeather, seed=seed, max_tokens=1500)

    for answer in ask_at_once(ask, 4):
        (choice,) = answer.choices
        assert isinstance(choice.message.parsed, GetWeather)
        thought += bool(getattr(choice.message, "reasoning_content", None))
    assert thought == 4 or family != "thinking"


@pytest.mark.parametrize("family", ["thinking", "gpt_oss"])
def test_a_choice_is_the_answer_without_thinking(clients: Clients, family: str) -> None:
    body = {"structured_outputs": {"choice": ["alpha", "beta"]}}
    answer = clients[family].chat.completions.create(model="base", messages=SAY, extra_body=body)
    assert answer.choices[0].message.content in ("alpha", "beta")
    assert getattr(answer.choices[0].message, "reasoning_content", None) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tool_choice": "required", "tools": []}, "tool_choice: give the tools to choose from in tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "Fly"}}}, "tool_choice: give the tools to choose"),
        ({"tools": TOOLS * 2}, "tools: two of them have the same name"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "forced call can't also follow"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]},
            "a schema of the answer or of a tool can't be honoured: Unimplemented keys",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": ALLOWED | {"tools": []}}},
            "give the tools to choose",
        ),
        (
            {"tools": TOOLS[:1], "tool_choice": {"type": "allowed_tools", "allowed_tools": ALLOWED}},
            "tool_choice: give the tools to choose from in tools",
        ),
        ({"messages": [*SAY, {"role": "tool", "content": "x"}]}, "messages.1.tool_call_id: required, but not given"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "only in a message of role tool"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_named(clients: Clients, change: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"model": "base", "messages": SAY, "tools": TOOLS, "tool_choice": "required"} | change
    with pytest.raises(openai.BadRequestError, match=re.escape(message)):
        clients["hermes"].chat.completions.create(**asked)


def test_a_template_without_tools_refuses_them(tiny_llama: Path, tmp_path: Path) -> None:
    base = load(tiny_llama)
    for settings, message in (
        ({}, "tools: the base's chat template writes no calls in a known way"),
        ({"tool_call_parser": "hermes"}, "tools: the base's chat template does not show 'GetWeather'"),
    ):
        replicas = OneEngine(base, Registry(tmp_path), **settings)
        config = parse(ServeConfig, {"base": base.id})
        with listening(Gateway(config, Registry(tmp_path), replicas)) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
            with pytest.raises(openai.BadRequestError, match=re.escape(message)):
                client.chat.completions.create(model="base", messages=SAY, tools=TOOLS)
        asyncio.run(replicas.engine.close())
