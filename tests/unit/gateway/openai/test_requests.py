"""OpenAI's wire: each key of its client's types has an answer here, null is absent, and mistakes are told in words."""

from __future__ import annotations

import json
import re
from typing import Any, get_type_hints

import pytest
from openai.types import EmbeddingCreateParams, chat, completion_create_params, responses, shared_params
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from openai.types.shared_params import response_format_json_schema
from pydantic import BaseModel

from rankloom.config import parse
from rankloom.config.serve import ServeConfig
from rankloom.engine.jobs import CompletionJob
from rankloom.gateway.openai.bodies import MOST_PARTS, MOST_VALUES, read
from rankloom.gateway.openai.embeddings import EmbeddingRequest
from rankloom.gateway.openai.errors import WireError
from rankloom.gateway.openai.messages import Message, TextPart, ToolCall
from rankloom.gateway.openai.requests import ChatRequest, CompletionRequest, StreamOptions
from rankloom.gateway.openai.response_items import (
    ContentPart,
    FunctionCallItem,
    FunctionCallOutputItem,
    MessageItem,
    ReasoningItem,
)
from rankloom.gateway.openai.response_request import (
    FlatAllowedTools,
    FlatSchema,
    FlatTool,
    FlatToolName,
    ReasoningConfig,
    ResponseRequest,
    ResponseStreamOptions,
    TextConfig,
)
from rankloom.gateway.openai.structured import JsonObject, JsonSchema, NamedSchema
from rankloom.gateway.openai.tools import Function, FunctionTool, NamedTool

SAY = {"model": "bank", "messages": [{"role": "user", "content": "hi"}]}
COMPLETE = {"model": "bank", "prompt": "hi"}
CONFIG = parse(ServeConfig, {"base": "org/base"})
Asked = ChatRequest | CompletionRequest | EmbeddingRequest | ResponseRequest
START: dict[Any, dict[str, Any]] = {
    ChatRequest: SAY,
    CompletionRequest: COMPLETE,
    EmbeddingRequest: {"model": "bank", "input": "hi"},
    ResponseRequest: {"model": "bank", "input": "hi"},
}
KINDS = [
    (chat_create_params.CompletionCreateParamsNonStreaming, ChatRequest),
    (completion_create_params.CompletionCreateParamsNonStreaming, CompletionRequest),
    (EmbeddingCreateParams, EmbeddingRequest),
    (response_create_params.ResponseCreateParamsNonStreaming, ResponseRequest),
    (chat.ChatCompletionSystemMessageParam, Message),
    (chat.ChatCompletionDeveloperMessageParam, Message),
    (chat.ChatCompletionUserMessageParam, Message),
    (chat.ChatCompletionAssistantMessageParam, Message),
    (chat.ChatCompletionToolMessageParam, Message),
    (chat.ChatCompletionMessageFunctionToolCallParam, ToolCall),
    (chat.ChatCompletionFunctionToolParam, FunctionTool),
    (chat.ChatCompletionNamedToolChoiceParam, NamedTool),
    (shared_params.FunctionDefinition, Function),
    (shared_params.ResponseFormatJSONObject, JsonObject),
    (shared_params.ResponseFormatJSONSchema, JsonSchema),
    (response_format_json_schema.JSONSchema, NamedSchema),
    (chat.ChatCompletionContentPartTextParam, TextPart),
    (chat.ChatCompletionStreamOptionsParam, StreamOptions),
    (response_create_params.StreamOptions, ResponseStreamOptions),
    (responses.EasyInputMessageParam, MessageItem),
    (responses.ResponseOutputMessageParam, MessageItem),
    (responses.response_input_item_param.Message, MessageItem),
    (responses.ResponseFunctionToolCallParam, FunctionCallItem),
    (responses.response_input_item_param.FunctionCallOutput, FunctionCallOutputItem),
    (responses.ResponseReasoningItemParam, ReasoningItem),
    (responses.ResponseInputTextParam, ContentPart),
    (responses.ResponseOutputTextParam, ContentPart),
    (responses.FunctionToolParam, FlatTool),
    (responses.ToolChoiceFunctionParam, FlatToolName),
    (responses.ToolChoiceAllowedParam, FlatAllowedTools),
    (responses.ResponseTextConfigParam, TextConfig),
    (responses.ResponseFormatTextJSONSchemaConfigParam, FlatSchema),
    (shared_params.Reasoning, ReasoningConfig),
]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WRONG_CALL = CALL | {"function": {"name": "f", "arguments": "["}}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
DONE: dict[str, list[Any]] = {
    "audio": [],
    "best_of": [1],
    "dimensions": [1, 256],
    "echo": [False, True],
    "encoding_format": ["float", "base64"],
    "frequency_penalty": [0.5],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}],
    "max_completion_tokens": [5],
    "max_tokens": [5],
    "metadata": [{}, {"a": "b", "c": None}],
    "modalities": [["text"]],
    "model": ["bank"],
    "moderation": [],
    "n": [1, 2],
    "parallel_tool_calls": [True, False],
    "prediction": [{"type": "content", "content": "yes"}],
    "presence_penalty": [-1],
    "prompt_cache_key": ["k"],
    "prompt_cache_options": [{"mode": "explicit", "ttl": "30m"}],
    "prompt_cache_retention": ["in_memory", "24h"],
    "reasoning_effort": [],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": True}},
    ],
    "safety_identifier": ["k"],
    "seed": [0, -1, 2**63 - 1, -(2**63)],
    "service_tier": ["auto", "default", "flex", "priority"],
    "stop": ["", "a", [], ["a"] * 17],
    "store": [False],
    "stream": [False, True],
    "stream_options": [{"include_usage": True}, {"include_obfuscation": False}, {"include_usage": None}],
    "suffix": [""],
    "temperature": [0, 1.5],
    "tool_choice": ["none", "auto"],
    "tools": [[], [{"type": "function", "function": FUNCTION | {"strict": True, "description": "It flies."}}]],
    "top_p": [0, 1],
    "user": ["ann"],
    "verbosity": ["medium"],
    "web_search_options": [],
}
"""Values that are taken."""
REFUSED: dict[str, list[Any]] = {
    "dimensions": [0],
    "encoding_format": ["int8"],
    "audio": [{"format": "wav", "voice": "alloy"}],
    "best_of": [3],
    "function_call": [{"name": "f"}],
    "functions": [[FUNCTION]],
    "logit_bias": [{"5": 1}],
    "modalities": [["text", "audio"], ["audio"]],
    "moderation": [{"model": "omni"}],
    "reasoning_effort": ["none", "high"],
    "response_format": [
        {"type": "grammar"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": 5}},
    ],
    "store": [True],
    "stream_options": [{"include_obfuscation": True}],
    "suffix": ["."],
    "tool_choice": [
        "required",
        {"type": "function", "function": {"name": "f"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
        {"type": "custom", "custom": {"name": "f"}},
    ],
    "tools": [[{"type": "custom", "custom": {"name": "f"}}], [{"type": "function", "function": {"name": "a b"}}]],
    "verbosity": ["low", "high"],
    "web_search_options": [{}],
}
"""Values that ask for what is not done here: they are refused by name."""

DONE_ITEMS: dict[str, list[Any]] = {key: DONE[key] for key in (
    "metadata", "model", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "stream", "temperature", "top_p", "user", "moderation",
)} | {
    "access_programs": [], "background": [False], "background_options": [], "context_management": [[]],
    "conversation": [], "image": [],
    "include": [[], ["message.output_text.logprobs"], ["reasoning.encrypted_content"]],
    "instructions": ["Be brief."], "max_output_tokens": [5], "max_tool_calls": [3], "previous_response_id": [],
    "prompt": [], "reasoning": [{}, {"effort": None, "summary": "auto"}],
    "stream_options": [{"include_obfuscation": False}],
    "text": [
        {}, {"format": {"type": "text"}, "verbosity": "medium"}, {"format": {"type": "json_object"}},
        {"format": {"type": "json_schema", "name": "a", "schema": {}, "strict": True, "description": "An A."}},
    ],
    "tool_choice": ["none", "auto"],
    "tools": [[], [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}]],
    "truncation": ["disabled"],
}  # fmt: skip
"""Values that `/v1/responses` takes."""
REFUSED_ITEMS: dict[str, list[Any]] = {key: REFUSED[key] for key in ("moderation", "store")} | {
    "access_programs": [{"cyber": "standard"}], "background": [True], "background_options": [{}],
    "context_management": [[{"type": "compaction"}]], "conversation": ["c", {"id": "c"}],
    "image": [{"context_compression": "enabled"}], "include": [["file_search_call.results"]],
    "max_output_tokens": [0, 5000], "previous_response_id": ["resp_1"], "prompt": [{"id": "p"}],
    "reasoning": [{"effort": "low"}, {"summary": "detailed"}], "stream_options": [{"include_obfuscation": True}],
    "text": [{"verbosity": "low"}, {"format": {"type": "grammar"}}],
    "tool_choice": ["required", {"type": "function", "name": "f"}, {"type": "web_search"}],
    "tools": [[{"type": "web_search"}], [{"type": "function", "name": "a b", "parameters": None, "strict": None}]],
    "truncation": ["auto"],
}  # fmt: skip
"""Values that it refuses by name."""


def wanted(kind: type[Asked], change: dict[str, Any]) -> CompletionJob:
    body = read(kind, json.dumps(START[kind] | change).encode())
    return body.make_job("w", CONFIG)


def told(kind: type[BaseModel], body: Any) -> str:
    with pytest.raises(WireError) as caught:
        read(kind, json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value.message


@pytest.mark.parametrize(("theirs", "ours"), KINDS, ids=lambda kind: kind.__name__)
def test_each_key_of_the_openai_package_has_an_answer(theirs: Any, ours: type[BaseModel]) -> None:
    names = {field.alias or name for name, field in ours.model_fields.items()}
    assert set(get_type_hints(theirs)) - names == set()


@pytest.mark.parametrize(("theirs", "ours"), KINDS[:4], ids=["chat", "text", "embeddings", "responses"])
def test_each_key_is_taken_or_refused_by_name(theirs: Any, ours: type[Asked]) -> None:
    done, refused = (DONE_ITEMS, REFUSED_ITEMS) if ours is ResponseRequest else (DONE, REFUSED)
    skipped = {"messages", "input", "logprobs", "top_logprobs"} | ({"prompt"} if ours is CompletionRequest else set())
    for key in set(get_type_hints(theirs)) - skipped:
        assert done[key] or refused[key]
        if key != "model":
            wanted(ours, {key: None})
        for value in done[key]:
            wanted(ours, {key: value})
        for value in refused.get(key, []):
            with pytest.raises(WireError) as caught:
                wanted(ours, {key: value})
            assert (caught.value.status, caught.value.param) == (400, key)
            assert re.match(rf"{key}[.:]", caught.value.message)
            assert re.search(
                r"leave it out|only |; |expected |required|give |should match|must be", caught.value.message
            )


@pytest.mark.parametrize(
    "change",
    [
        {"use_beam_search": False}, {"skip_special_tokens": True}, {"add_generation_prompt": True}, {"best_of": 1},
        {"continue_final_message": False}, {"length_penalty": 1.0}, {"min_tokens": 0}, {"cache_prompt": True},
        {"logprobs": False, "top_logprobs": 0}, {"n": 2, "best_of": 2}, {"nobody_knows": None}, {"echo": False},
        {"stream_options": {"include_usage": True, "nobody_knows": None}},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_done_anyway_may_be_asked_for(change: dict[str, Any]) -> None:
    assert wanted(ChatRequest, change) == wanted(ChatRequest, {key: change[key] for key in ("n",) if key in change})


def test_an_answer_can_be_put_back_into_the_history() -> None:
    dumped = ChatCompletionMessage(role="assistant", content="yes").model_dump()
    assert {"annotations", "audio", "function_call", "tool_calls", "refusal"} < set(dumped)
    asked = {"role": "user", "name": "ann", "id": "m-1", "content": [{"type": "text", "text": "a"}] * 2}
    asked["content"][0]["cache_control"] = {"type": "ephemeral"}  # type: ignore[index]
    for answer in (dumped, dumped | {"annotations": [], "tool_calls": []}):
        body = SAY | {"messages": [asked, answer, {"role": "user", "content": "b", "name": None}]}
        (talk,) = read(ChatRequest, json.dumps(body).encode()).make_job("w", CONFIG).prompts
        said = [("user", "aa"), ("assistant", "yes"), ("user", "b")]
        assert [(message["role"], message["content"]) for message in talk.messages] == said  # type: ignore[union-attr]
        assert [message.get("name") for message in talk.messages] == ["ann", None, None]  # type: ignore[union-attr]


def test_values_at_the_edge_mean_what_openai_means() -> None:
    assert wanted(ChatRequest, {"top_p": 0}).sampling.top_p == pytest.approx(0, abs=1e-5)
    seeds = [wanted(ChatRequest, {"seed": seed}).sampling.seed for seed in (-1, -2, -(2**63), 7, None)]
    assert len(set(seeds)) == 5
    assert seeds[3:] == [7, None]
    assert wanted(ChatRequest, {"stop": ""}).sampling.stop == ()
    assert wanted(ChatRequest, {"stop": [str(number) for number in range(17)]}).sampling.stop[16] == "16"


def talk(content: Any) -> dict[str, Any]:
    return SAY | {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (ChatRequest, SAY | {"stop": [str(n) for n in range(65)]}, "stop: at most 64 (given 65)"),
        (ChatRequest, SAY | {"stop": ["a", ""]}, "stop.1: at least 1 character(s) (given \"\")"),
        (ChatRequest, SAY | {"stop": ["a", 5]}, "stop.1: expected a text (given 5)"),
        (ChatRequest, SAY | {"stop": 5}, "stop: expected a text or a list of texts (given 5)"),
        (ChatRequest, SAY | {"stop": {"a": "b"}}, "stop: expected a text or a list of texts (given an object)"),
        (
            ChatRequest,
            talk([{"type": "image_url", "image_url": {"url": "x" * 10**5}}]),
            "messages.0.content.0.type: only 'text' (given \"image_url\")",
        ),
        (ChatRequest, talk(None), "messages.0.content: required, but not given"),
        (
            ChatRequest,
            SAY | {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "messages.0.tool_calls.0.type: required, but not given",
        ),
        (
            ChatRequest,
            SAY | {"messages": [{"role": "assistant", "tool_calls": [WRONG_CALL]}]},
            'messages.0.tool_calls.0.function.arguments: expected the text of a JSON object (given "[")',
        ),
        (
            ChatRequest,
            SAY | {"messages": [{"role": "function", "content": "x", "name": "f"}]},
            "messages.0.role: only 'system', 'developer', 'user', 'assistant' or 'tool' (given \"function\"); give "
            "what it returned in a message of role tool",
        ),
        (
            ChatRequest,
            SAY | {"response_format": {"type": "yaml"}},
            "response_format: expected an object of type text, json_object or json_schema (given an object)",
        ),
        (ChatRequest, talk([]), "messages.0.content: at least 1 (given 0)"),
        (ChatRequest, talk(5), "messages.0.content: expected a text or a list of parts of type text (given 5)"),
        (ChatRequest, talk([{"type": "text"}]), "messages.0.content.0.text: required, but not given"),
        (ChatRequest, SAY | {"messages": [5]}, "messages.0: expected an object (given 5)"),
        (ChatRequest, SAY | {"messages": "hi"}, 'messages: expected a list (given "hi")'),
        (
            ChatRequest,
            SAY | {"messages": [{"role": "tool", "content": "x"}]},
            "messages.0.tool_call_id: required, but not given",
        ),
        (CompletionRequest, COMPLETE | {"prompt": [1, -5]}, "prompt.1: must be greater than or equal to 0 (given -5)"),
        (CompletionRequest, COMPLETE | {"prompt": ["a", [5]]}, "prompt.1: expected a text (given a list)"),
        (CompletionRequest, COMPLETE | {"prompt": [[5], "a"]}, 'prompt.1: expected a list (given "a")'),
        (CompletionRequest, COMPLETE | {"prompt": [1, "a"]}, 'prompt.1: expected a whole number (given "a")'),
        (CompletionRequest, COMPLETE | {"prompt": []}, "prompt: at least 1 (given 0)"),
        (CompletionRequest, COMPLETE | {"prompt": 5}, "prompt: expected a text, a list of texts, a list of token ids"),
        (CompletionRequest, COMPLETE | {"echo": 1}, "echo: expected true or false (given 1)"),
        (ChatRequest, SAY | {"echo": True}, "echo: only false (given true); put the prompt before the answer"),
        (CompletionRequest, COMPLETE | {"temperature": "1"}, 'temperature: expected a number (given "1")'),
        (CompletionRequest, COMPLETE | {"stream": 1}, "stream: expected true or false (given 1)"),
        (CompletionRequest, COMPLETE | {"metadata": {str(n): 1 for n in range(17)}}, "metadata: at most 16 (given 17)"),
        (CompletionRequest, COMPLETE | {"metadata": {"a": 1}}, "metadata.a: expected a text (given 1)"),
        (CompletionRequest, COMPLETE | {"user": "u" * 513}, "user: at most 512 characters"),
        (CompletionRequest, [], "body: expected an object (given a list)"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_mistake_is_told_in_words(kind: type[BaseModel], body: Any, message: str) -> None:
    assert told(kind, body).startswith(message)
    assert len(told(kind, body)) < 200


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "[" + ",".join(["[]"] * MOST_PARTS) + "]",
            "The body has more than 65536 keys, texts, lists and objects; ask in",
        ),
        ('["' + '","'.join(['\\\\\\" a'] * (MOST_PARTS + 1)) + '"]', "more than 65536 keys, texts"),
        (
            "[" + ",".join(["0"] * (MOST_VALUES + 1)) + "]",
            "The body has more than 262144 values; ask in several requests.",
        ),
        ('{"prompt": "' + "[{,\\\\" * 99999 + '"a', "The body is not valid JSON: "),
    ],
    ids=["lists", "texts", "numbers", "none in a text"],
)
def test_a_body_of_very_many_parts_is_refused_before_they_are_made(text: str, told: str) -> None:
    with pytest.raises(WireError, match=re.escape(told)):
        read(CompletionRequest, text.encode())


def test_a_byte_order_mark_says_nothing() -> None:
    assert read(CompletionRequest, b"\xef\xbb\xbf" + json.dumps(COMPLETE).encode()).prompt == "hi"
