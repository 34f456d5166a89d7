"""What a completion is to match: OpenAI's `response_format`, and vLLM's `structured_outputs`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from rankloom.engine.protocol import Grammar
from rankloom.gateway.openai.body import OBJECT, SCHEMA, TEXT, Body, Off, On, Text, limit_length
from rankloom.gateway.openai.errors import WireError

LONGEST = 65_536
"""Characters of a schema, a grammar, or all choices: compiling more takes noticeably long."""
LONGEST_REGEX = 4096
ANY_OBJECT = Grammar(kind="json", text='{"type":"object"}')


def _write_schema(value: Any) -> str:
    """Return a schema's text, which its length bounds. This runs where the body is parsed."""
    if not isinstance(value, dict | bool):
        raise PydanticCustomError("no_kind", "expected a JSON schema")
    return check_length(json.dumps(value, separators=(",", ":")))


def _write_schema_or_text(value: Any) -> str:
    return check_length(value) if isinstance(value, str) else _write_schema(value)


def check_length(text: str) -> str:
    """Refuse a schema's text that is too long."""
    if len(text) > LONGEST:
        context = {"most": LONGEST, "length": len(text)}
        raise PydanticCustomError("long_texts", "a JSON schema of at most {most} characters, not {length}", context)
    return text


class PlainText(Body):
    type: Literal["text"]

    def make_grammar(self) -> Grammar | None:
        return None


class JsonObject(Body):
    type: Literal["json_object"]

    def make_grammar(self) -> Grammar | None:
        return ANY_OBJECT


class NamedSchema(Body):
    name: Annotated[Text, Field(max_length=512)] | None = None
    """Without effect."""
    description: Annotated[Text, Field(max_length=65_536)] | None = None
    """Without effect: describe it in a message."""
    strict: bool | None = None
    """Without effect: every schema is honoured, or refused."""
    text: Annotated[Any, AfterValidator(_write_schema)] = Field(default="{}", alias="schema")


class JsonSchema(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema

    def make_grammar(self) -> Grammar | None:
        return Grammar(kind="json", text=self.json_schema.text)


def _tag_format(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"text": TEXT, "json_object": OBJECT, "json_schema": SCHEMA}.get(kind) if isinstance(kind, str) else None


BY_FORMAT = Discriminator(
    _tag_format,
    custom_error_type="no_kind",
    custom_error_message="expected an object of type text, json_object or json_schema",
)
"""Tells the kinds of a format apart, of a chat and of a response."""

ResponseFormat = Annotated[
    Annotated[PlainText, Tag(TEXT)] | Annotated[JsonObject, Tag(OBJECT)] | Annotated[JsonSchema, Tag(SCHEMA)],
    BY_FORMAT,
]


class StructuredOutputs(Body):
    """vLLM's key; exactly one of its keys."""

    choice: (
        Annotated[
            list[Annotated[Text, Field(min_length=1, max_length=4096)]],
            Field(min_length=1, max_length=1024, fail_fast=True),
            limit_length(LONGEST),
        ]
        | None
    ) = None
    """The completion is one of these texts, whole."""
    json_text: Annotated[Any, AfterValidator(_write_schema_or_text)] = Field(default=None, alias="json")
    """A JSON schema, or its text."""
    json_object: On | None = None
    regex: Annotated[Text, Field(min_length=1, max_length=LONGEST_REGEX)] | None = None
    grammar: Annotated[Text, Field(min_length=1, max_length=LONGEST)] | None = None
    """In Lark's notation or GBNF."""
    disable_any_whitespace: Off | None = None
    disable_additional_properties: Off | None = None
    whitespace_pattern: None = None
    structural_tag: None = None

    def make_constraint(self) -> dict[str, Any]:
        """Return the setting of `Sampling`. Raises WireError where there is none, or more than one."""
        names = ("choice", "json_text", "json_object", "regex", "grammar")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise WireError(
                400,
                f"structured_outputs: exactly one of choice, json, json_object, regex and grammar, not {len(given)}.",
                param="structured_outputs",
            )
        if self.choice is not None:
            return {"choices": tuple(self.choice)}
        if self.json_object:
            return {"grammar": ANY_OBJECT}
        if self.regex is not None:
            return {"grammar": Grammar(kind="regex", text=self.regex)}
        if self.grammar is not None:
            return {"grammar": Grammar(kind="grammar", text=self.grammar)}
        return {"grammar": Grammar(kind="json", text=self.json_text)}
