"""Thinking and calls are read from text in whatever parts it comes; what is neither stays content."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rankloom.engine.chat.harmony import HarmonyParser
from rankloom.engine.chat.json_calls import JsonCallParser, JsonFormat
from rankloom.engine.chat.pieces import CallArguments, CallBegin, Content, Parser, Piece, PlainParser, Thinking
from rankloom.engine.chat.thinking import ThinkingParser
from rankloom.engine.chat.xml_calls import XmlCallParser

NAMES = {"get", "put"}
UNKNOWN = '<tool_call>{"name": "no", "arguments": {}}</tool_call>'
NO_NAME = '<tool_call>{"name": ["get"], "arguments": {}}</tool_call>'
DEEP = f'<tool_call>{{"a": {"[" * 5000}{"]" * 5000}}}</tool_call>'
FORMATS = {
    "hermes": JsonFormat(("<tool_call>",), close="</tool_call>"),
    "llama": JsonFormat(("<|python_tag|>",), between=" \n\t\r;", bare=True),
    "mistral": JsonFormat(("[TOOL_CALLS]",), between=" \n\t\r,[]"),
    "named": JsonFormat(("[TOOL_CALLS]",), named="[ARGS]"),
}

LOOP = [{"$ref": "#/$defs/e"}] * 10
CODER: dict[str, Any] = {
    "get": {"properties": {"a": {"type": "integer"}, "b": {"anyOf": [{"type": "string"}, {"type": "null"}]}}},
    "put": {
        "properties": {"c": {"$ref": "#/$defs/c"}, "d": {"type": 5}, "e": {"$ref": "#/$defs/e"}},
        "$defs": {"c": {"type": ["array", "boolean"]}, "e": {"anyOf": [*LOOP, {"type": "integer"}]}},
    },
}


def wrap(name: str, **parameters: str) -> str:
    written = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in parameters.items())
    return f"<tool_call>\n<function={name}>\n{written}</function>\n</tool_call>"


def make(kind: str) -> Parser:
    match kind:
        case "coder":
            return XmlCallParser(CODER)
        case "harmony":
            return HarmonyParser(NAMES)
        case "thinks":
            return ThinkingParser(PlainParser(), begun=False)
        case "has begun":
            return ThinkingParser(JsonCallParser(FORMATS["hermes"], NAMES), begun=True)
    return JsonCallParser(FORMATS[kind], NAMES)


def read(kind: str, parts: list[str]) -> list[Piece]:
    """Read parts, and join pieces of one kind."""
    parser, joined = make(kind), list[Any]()
    pieces = [piece for part in parts for piece in parser.push(part)] + parser.finish()
    for piece in pieces:
        if joined and type(joined[-1]) is type(piece) and not isinstance(piece, CallBegin):
            joined[-1] = type(piece)(joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined


def split(text: str, seed: int) -> list[str]:
    chance, parts = random.Random(seed), list[str]()
    while text:
        length = chance.choice([1, 1, 2, 3, 7, 50])
        parts.append(text[:length])
        text = text[length:]
    return parts


def call(name: str, arguments: str) -> list[Piece]:
    return [CallBegin(name), CallArguments(arguments)]


def content(text: str) -> list[Piece]:
    return [Content(text)]


CASES: list[tuple[str, str, list[Piece]]] = [
    ("hermes", "hello", content("hello")),
    ("hermes", "a < b <tool", content("a < b <tool")),
    ("hermes", ' {"name": "get"}\n\nmore\n', content(' {"name": "get"}\n\nmore\n')),
    (
        "hermes",
        '<tool_call>\n{"name": "get", "arguments": {"a": "}\\"<\\\\"}}\n</tool_call>',
        call("get", '{"a": "}\\"<\\\\"}'),
    ),
    (
        "hermes",
        'I will.\n\n<tool_call>\n{"arguments": {"a": [1]}, "name": "put"}\n</tool_call>\n<tool_call>\n'
        '{"name": "get", "arguments": {}}\n</tool_call>\n',
        [*content("I will."), *call("put", '{"a": [1]}'), *call("get", "{}"), *content("\n")],
    ),
    ("hermes", '<tool_call>{"name": "get", "arguments": "{\\"a\\": 1}"}</tool_call>', call("get", '{"a": 1}')),
    ("hermes", '<tool_call>{"name": "get"}</tool_call>', call("get", "{}")),
    ("hermes", f"{UNKNOWN}.", content(f"{UNKNOWN}.")),
    ("hermes", NO_NAME, content(NO_NAME)),
    ("hermes", DEEP, content(DEEP)),
    ("hermes", "<tool_call>broken", content("<tool_call>broken")),
    ("hermes", '<tool_call>\n{"name": "get", "arguments": {"a": ', call("get", '{"a": ')),
    ("llama", '{"name": "get", "parameters": {"a": 1}}', call("get", '{"a": 1}')),
    (
        "llama",
        '<|python_tag|>{"type": "function", "name": "get", "parameters": {"a": 1}}; {"name": "put", "parameters": {}}',
        [*call("get", '{"a": 1}'), *call("put", "{}")],
    ),
    ("llama", '{"a": 1} is JSON', content('{"a": 1} is JSON')),
    ("llama", 'See {"name": "get", "parameters": {}}', content('See {"name": "get", "parameters": {}}')),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get", "arguments": {"a": 1}}, {"name": "put", "arguments": {}, "id": "123456789"}]',
        [*call("get", '{"a": 1}'), *call("put", "{}")],
    ),
    ("mistral", " hello [", content(" hello [")),
    (
        "named",
        'Yes.[TOOL_CALLS]get[ARGS]{"a": {"b": 1}}[TOOL_CALLS]put[CALL_ID]x1[ARGS]{}',
        [*content("Yes."), *call("get", '{"a": {"b": 1}}'), *call("put", "{}")],
    ),
    ("named", "[TOOL_CALLS]no[ARGS]{}", content("[TOOL_CALLS]no[ARGS]{}")),
    (
        "harmony",
        "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary to=functions.get "
        '<|constrain|>json<|message|>{"a": 1}',
        [Thinking("Let me see."), *call("get", '{"a": 1}')],
    ),
    ("harmony", " to=functions.put<|channel|>commentary json<|message|>{}<|call|>", call("put", "{}")),
    ("harmony", "<|channel|>final<|message|>a < b <|", content("a < b <|")),
    ("coder", "hello <tool", content("hello <tool")),
    ("coder", f"I will.\n\n{wrap('get', a='1', b='2')}\n", [*content("I will."), *call("get", '{"a": 1, "b": "2"}')]),
    ("coder", wrap("get", a="many", b="null"), call("get", '{"a": "many", "b": null}')),
    ("coder", wrap("get", b='a\n<b>"ü\n'), call("get", '{"b": "a\\n<b>\\"ü\\n"}')),
    (
        "coder",
        f"{wrap('put', c='[1, {}]')}\n{wrap('put', c='True')}\nmore",
        [*call("put", '{"c": [1, {}]}'), *call("put", '{"c": true}'), *content("\nmore")],
    ),
    ("coder", wrap("put", d="1", e="2"), call("put", '{"d": "1", "e": 2}')),
    ("coder", "<function=get>\n</function>\n</tool_call>", call("get", "{}")),
    ("coder", f"{wrap('no', a='1')}.", content(f"{wrap('no', a='1')}.")),
    ("coder", "<tool_call>broken", content("<tool_call>broken")),
    ("coder", "<tool_call>\n<function=get>\n<parameter=a>\n5", call("get", "{")),
    ("harmony", "alpha", content("alpha")),
    ("thinks", "<think>\nHm.</think>\n\nYes.", [Thinking("\nHm."), *content("Yes.")]),
    ("thinks", "No <think>.", content("No <think>.")),
    ("thinks", "<think>Hm", [Thinking("Hm")]),
    ("thinks", "<thin", content("<thin")),
    (
        "has begun",
        'Hm.</think>\n\nYes.\n<tool_call>{"name":"get","arguments":{}}</tool_call>',
        [Thinking("Hm."), *content("Yes."), *call("get", "{}")],
    ),
    ("has begun", "Hm </th", [Thinking("Hm </th")]),
]


@pytest.mark.parametrize(("kind", "text", "expected"), CASES, ids=lambda value: str(value)[:30])
def test_texts_are_read_alike_in_any_parts(kind: str, text: str, expected: list[Piece]) -> None:
    assert read(kind, [text]) == expected
    for seed in range(50):
        assert read(kind, split(text, seed)) == expected, seed


@pytest.mark.parametrize("kind", ["hermes", "named", "harmony"])
def test_arguments_are_given_as_they_come(kind: str) -> None:
    begin = {
        "hermes": '<tool_call>\n{"name": "get", "arguments": ',
        "named": "[TOOL_CALLS]get[ARGS]",
        "harmony": "<|channel|>commentary to=functions.get<|message|>",
    }[kind]
    parser = make(kind)
    assert parser.push(begin) + parser.push('{"a": ') == call("get", '{"a": ')
    assert parser.push('"bc') == [CallArguments('"bc')]
    assert parser.push('d"}') == [CallArguments('d"}')]
