"""The tools of a request for a chat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from rankloom.gateway.openai.body import LIST, OBJECT, TEXT, Body, Text, tag_one_or_list
from rankloom.gateway.openai.errors import WireError
from rankloom.gateway.openai.structured import check_length


def _check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    check_length(json.dumps(schema))
    return schema


class Function(Body):
    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Annotated[Text, Field(max_length=65_536)] | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_check_parameters)] | None = None
    """The JSON schema of its arguments; null: it has none."""
    strict: bool | None = None
    """Whether every call follows the schema; a forced one does anyway."""


class FunctionTool(Body):
    type: Literal["function"]
    function: Function

    def to_template(self) -> dict[str, Any]:
        """Return the tool as chat templates know it."""
        function = {"name": self.function.name, "description": self.function.description or ""}
        parameters = self.function.parameters or {"type": "object", "properties": {}}
        strict = {"strict": True} if self.function.strict else {}
        return {"type": "function", "function": function | {"parameters": parameters} | strict}


Tools = Annotated[list[FunctionTool], Field(max_length=128, fail_fast=True)]


class FunctionName(Body):
    name: Annotated[Text, Field(max_length=64)]


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(max_length=128, fail_fast=True)]


class AllowedToolChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _tag_choice(value: Any) -> str | None:
    is_allowed = isinstance(value, dict) and value.get("type") == "allowed_tools"
    return LIST if is_allowed else tag_one_or_list(value)


BY_CHOICE = Discriminator(
    _tag_choice,
    custom_error_type="no_kind",
    custom_error_message="expected none, auto, required, a function of tools or allowed_tools",
)
"""Tells the kinds of a `tool_choice` apart, of a chat and of a response."""

ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(TEXT)]
    | Annotated[NamedTool, Tag(OBJECT)]
    | Annotated[AllowedToolChoice, Tag(LIST)],
    BY_CHOICE,
]
"""A name forces a call of that tool, `required` of any. `allowed_tools` is as if its tools were the only ones."""


def choose_tools(
    tools: Sequence[FunctionTool], choice: ToolChoice | None
) -> tuple[list[FunctionTool], tuple[str, ...]]:
    """Return the tools that the model may call, and the names of those of which it must call one.

    Raises:
        WireError: two tools have the same name, or the choice is among tools that are not given.
    """
    given = {tool.function.name: tool for tool in tools}
    if len(given) != len(tools):
        raise WireError(400, "tools: two of them have the same name.", param="tools")
    named, mode = list(given), choice if isinstance(choice, str) else "auto"
    if isinstance(choice, NamedTool):
        named, mode = [choice.function.name], "required"
    elif isinstance(choice, AllowedToolChoice):
        named, mode = [tool.function.name for tool in choice.allowed_tools.tools], choice.allowed_tools.mode
    if (not named and choice not in (None, "auto", "none")) or not set(named) <= set(given):
        raise WireError(400, "tool_choice: give the tools to choose from in tools.", param="tool_choice")
    callable_ = named if isinstance(choice, AllowedToolChoice) else [] if mode == "none" else list(given)
    return [given[name] for name in dict.fromkeys(callable_)], tuple(dict.fromkeys(named)) if mode == "required" else ()
