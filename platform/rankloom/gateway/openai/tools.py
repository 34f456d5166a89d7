"""The tools of a request for a chat."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Tag
from pydantic_core import PydanticCustomError

from rankloom.gateway.openai.body import OBJECT, TEXT, Body, Text, choose_either
from rankloom.gateway.openai.structured import LONGEST


def _check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    if (length := len(json.dumps(schema))) > LONGEST:
        context = {"most": LONGEST, "length": length}
        raise PydanticCustomError("long_texts", "a JSON schema of at most {most} characters, not {length}", context)
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


class FunctionName(Body):
    name: Annotated[Text, Field(max_length=64)]


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(TEXT)] | Annotated[NamedTool, Tag(OBJECT)],
    choose_either("expected none, auto, required or a function of tools"),
]
"""A name forces a call of that tool, `required` of any."""
