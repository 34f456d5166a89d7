"""The grammars of answers, on tokenizers that have a family's marks as tokens and on those that spell them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chat_templates import write_base
from rankloom.engine.chat.format import ChatFormat
from rankloom.engine.chat.xml_calls import write_parameters
from rankloom.engine.grammar import Grammars
from rankloom.engine.prompts import Prompts
from rankloom.engine.protocol import ChatPrompt, Grammar
from rankloom.errors import RequestError
from served import load

PAY = {
    "type": "function",
    "function": {
        "name": "Pay",
        "description": "",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"cents": {"type": "integer", "minimum": 0, "maximum": 500}},
            "required": ["cents"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "Pay", "arguments": {"cents": 5}}\n</tool_call>'
SCHEMA = Grammar(kind="json", text='{"type": "integer"}')


def is_whole(folder: Path, text: str, tools: tuple[dict[str, Any], ...] = (), grammar: Grammar | None = None) -> bool:
    """Return whether a text is a whole answer by the grammar of its conversation."""
    base = load(folder)
    tokenizer = base.tokenizer
    ends = [tokenizer.eos_token_id]
    prompt = ChatPrompt(({"role": "user", "content": "Pay!"},), tools, (), True)
    opened = ChatFormat(Prompts(tokenizer, base.model), tokenizer, None, ends).open(prompt, grammar)
    grammars = Grammars(tokenizer, ends, len(tokenizer))
    grammars.open()
    assert opened.grammar is not None
    state = grammars.compile(opened.grammar)
    tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return bool(state._matcher.try_consume_tokens(tokens) == len(tokens))


@pytest.mark.parametrize("family", ["hermes", "hermes_spelt"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello <tool_x> world", True),
        (CALL, True),
        (f"I look.\n{CALL}", True),
        (f"{CALL}\n{CALL}", True),
        (CALL.replace("5", "501"), False),
        (f"I look.\n{CALL.replace('Pay', 'Fly')}", False),
        ("I write <tool_call> as text", False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_strict_tool_is_called_by_its_schema_after_any_text(
    tiny_llama: Path, tmp_path: Path, family: str, text: str, expected: bool
) -> None:
    assert is_whole(write_base(tiny_llama, tmp_path / family, family), text, (PAY,)) == expected


@pytest.mark.parametrize("family", ["thinking", "thinking_spelt"])
@pytest.mark.parametrize(("text", "expected"), [("Hm 7.</think>\n\n7", True), ("Hm.</think>\n\nseven", False)])
def test_a_schema_is_of_what_follows_the_thinking(
    tiny_llama: Path, tmp_path: Path, family: str, text: str, expected: bool
) -> None:
    assert is_whole(write_base(tiny_llama, tmp_path / family, family), text, grammar=SCHEMA) == expected


BOOK: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Bern", "Oslo"]},
        "note": {"type": "string", "maxLength": 9},
        "guests": {"anyOf": [{"$ref": "#/$defs/guests"}, {"type": "null"}]},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"guests": {"type": "array", "items": {"type": "integer", "minimum": 1}, "maxItems": 2}},
}


def write_book(**parameters: str) -> str:
    written = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in parameters.items())
    return f"<tool_call>\n<function=book>\n{written}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (write_book(city="Bern"), True),
        (f"Fine.\n{write_book(city='Oslo', note='a <b>', guests='[1, 2]')}", True),
        (write_book(city="Oslo", guests="null"), True),
        (write_book(city="Rome"), False),
        (write_book(note="a"), False),
        (write_book(city="Bern", note="0123456789"), False),
        (write_book(city="Bern", guests="[0]"), False),
    ],
    ids=lambda value: str(value)[30:].replace("parameter", "")[:50],
)
def test_elements_follow_their_schemas(tiny_llama: Path, tmp_path: Path, text: str, expected: bool) -> None:
    tool = {"type": "function", "function": {"name": "book", "description": "", "strict": True, "parameters": BOOK}}
    assert is_whole(write_base(tiny_llama, tmp_path / "base", "qwen3_coder"), text, (tool,)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"note": {"type": "string", "pattern": "^a"}}, "'pattern' of the text 'note' can't be honoured"),
        ({"note": {"anyOf": [{"type": "string", "format": "date"}]}}, "'anyOf' of the text 'note'"),
        ({"note": {"type": 5}}, "type must be a string"),
        ({"note": False}, "'not' of the text 'note'"),
    ],
)
def test_what_elements_can_not_follow_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        write_parameters("arguments", BOOK | {"properties": BOOK["properties"] | change})
    with pytest.raises(RequestError, match="'minProperties' of a tool's parameters"):
        write_parameters("arguments", BOOK | {"minProperties": 1})


def test_an_element_may_be_anything() -> None:
    assert "<parameter=note>" in write_parameters("arguments", {"properties": {"note": True}})
