"""The items of `/v1/responses`: what a request's input has, as messages of a chat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from rankloom.gateway.openai.body import CALL, LIST, MESSAGE, OUTPUT, TEXT, THOUGHT, Body, Off, Text, choose_either
from rankloom.gateway.openai.messages import check_arguments

_Id = Annotated[Text, Field(max_length=512)]
_Status = Literal["in_progress", "completed", "incomplete"]
ITEM_TAGS = {"message": MESSAGE, "function_call": CALL, "function_call_output": OUTPUT, "reasoning": THOUGHT}


class ContentPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    """Without effect: sources that a text was given from."""
    logprobs: list[Any] | None = None
    """Without effect, as `parsed`, which OpenAI's client adds."""
    parsed: Any = None
    prompt_cache_breakpoint: dict[str, Any] | None = None
    """Without effect."""


_Parts = Annotated[list[ContentPart], Field(max_length=1024, fail_fast=True)]
TextOrParts = Annotated[
    Annotated[Text, Tag(TEXT)] | Annotated[_Parts, Tag(LIST)],
    choose_either("expected a text or a list of parts of type input_text or output_text"),
]


def _join(content: str | list[ContentPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class MessageItem(Body):
    """A message of the conversation, or an earlier answer."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: TextOrParts
    id: _Id | None = None
    """Without effect, as `status` and `phase`."""
    status: _Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(Body):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: _Id
    name: Annotated[Text, Field(min_length=1, max_length=64)]
    arguments: Annotated[Text, AfterValidator(check_arguments)]
    """A JSON object, as text."""
    id: _Id | None = None
    """Without effect, as `status` and `parsed_arguments`, which OpenAI's client adds."""
    parsed_arguments: Any = None
    status: _Status | None = None
    caller: dict[Literal["type"], Literal["direct"]] | None = None
    namespace: None = None
    is_async: Off | None = Field(default=None, alias="async")


class FunctionCallOutputItem(Body):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: _Id
    output: TextOrParts
    id: _Id | None = None
    """Without effect, as `status` and `name`."""
    status: _Status | None = None
    name: _Id | None = None
    caller: dict[Literal["type"], Literal["direct"]] | None = None
    namespace: None = None


class ReasoningPart(Body):
    type: Literal["reasoning_text", "summary_text"]
    text: Text


class ReasoningItem(Body):
    """The model's thoughts, for chat templates that show them."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningPart], Field(max_length=1024, fail_fast=True)] | None = None
    summary: Annotated[list[ReasoningPart], Field(max_length=1024, fail_fast=True)] | None = None
    """In place of a content that is missing."""
    id: _Id | None = None
    """Without effect, as `status` and `encrypted_content`."""
    status: _Status | None = None
    encrypted_content: Text | None = None


def _tag_item(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type") or "message"
    return ITEM_TAGS.get(kind) if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag(MESSAGE)]
    | Annotated[FunctionCallItem, Tag(CALL)]
    | Annotated[FunctionCallOutputItem, Tag(OUTPUT)]
    | Annotated[ReasoningItem, Tag(THOUGHT)],
    Discriminator(
        _tag_item,
        custom_error_type="no_kind",
        custom_error_message=f"expected an item of one of the types {', '.join(ITEM_TAGS)}",
    ),
]


def make_messages(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Return the messages of a chat; what an assistant thought, said and called in a row is one."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None

    def continue_turn(key: str) -> dict[str, Any]:
        """Return the assistant's message that a thing goes to: the last one, or a new one where it would come late."""
        order = ("reasoning_content", "content", "tool_calls")
        late = order[order.index(key) + (key == "tool_calls") :]
        if turn is not None and not any(turn.get(name) for name in late):
            return turn
        messages.append({"role": "assistant", "content": None})
        return messages[-1]

    for item in items:
        match item:
            case ReasoningItem():
                turn = continue_turn("reasoning_content")
                turn["reasoning_content"] = "".join(part.text for part in item.content or item.summary or ())
            case MessageItem(role="assistant"):
                turn = continue_turn("content")
                turn["content"] = _join(item.content)
            case FunctionCallItem():
                turn = continue_turn("tool_calls")
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                turn.setdefault("tool_calls", []).append(call)
            case MessageItem():
                turn = None
                messages.append({"role": item.role, "content": _join(item.content)})
            case FunctionCallOutputItem():
                turn = None
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _join(item.output)})
    for message in messages:
        if message["content"] is None and not message.get("tool_calls"):
            message["content"] = ""  # it was thinking alone
    return messages
