"""The messages of a conversation, as OpenAI's requests have them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from rankloom.gateway.openai.body import LIST, TEXT, Body, Text, choose_either


class TextPart(Body):
    type: Literal["text"]
    text: Text
    cache_control: dict[str, Any] | None = None
    """Without effect: a shared beginning is found without it."""
    prompt_cache_breakpoint: dict[str, Any] | None = None
    """Without effect."""


def check_arguments(text: str) -> str:
    """Return a call's arguments, which templates take as an object."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise PydanticCustomError("no_kind", "expected the text of a JSON object")
    return text


class CalledFunction(Body):
    name: Annotated[Text, Field(min_length=1, max_length=64)]
    arguments: Annotated[Text, AfterValidator(check_arguments)]
    """A JSON object, as text."""


class ToolCall(Body):
    id: Annotated[Text, Field(max_length=512)]
    type: Literal["function"]
    function: CalledFunction

    def to_template(self) -> dict[str, Any]:
        """Return the call as chat templates know it: with an object as arguments."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments or "{}")}
        return {"id": self.id, "type": self.type, "function": function}


def _make_error(key: str, text: str) -> PydanticCustomError:
    return PydanticCustomError("of_key", "{text}", {"key": key, "text": text})


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: Annotated[Text, Field(max_length=512)] | None = None
    """The speaker, for chat templates that show it."""
    id: Annotated[Text, Field(max_length=512)] | None = None
    """Without effect."""
    annotations: list[Any] | None = None
    """Without effect: sources that a text was given from."""
    cache_control: dict[str, Any] | None = None
    """Without effect."""
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    """The assistant's calls."""
    tool_call_id: Annotated[Text, Field(max_length=512)] | None = None
    """The call that a tool's message has the result of."""
    reasoning_content: Text | None = None
    """The assistant's thoughts, for chat templates that show them."""
    function_call: None = None
    refusal: None = None
    audio: None = None
    content: (
        Annotated[
            Annotated[Text, Tag(TEXT)]
            | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True), Tag(LIST)],
            choose_either("expected a text or a list of parts of type text"),
        ]
        | None
    ) = None
    """The last key, as it may be missing for the sake of one above, whose mistake tells more."""

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise _make_error("content", "required, but not given")
        if self.role == "tool" and self.tool_call_id is None:
            raise _make_error("tool_call_id", "required, but not given")
        for key, role in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, key) and self.role != role:
                raise _make_error(key, f"only in a message of role {role}")
        return self

    def to_template(self) -> dict[str, Any]:
        """Return the message as chat templates know it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.to_template() for call in self.tool_calls]
        others = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning_content}
        return message | {name: value for name, value in others.items() if value}


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
