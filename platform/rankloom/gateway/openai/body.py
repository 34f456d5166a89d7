"""What the types of OpenAI's request bodies have in common: unknown keys are refused, null is as good as absent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, model_validator
from pydantic_core import PydanticCustomError

Text = str
"""Sound Unicode: what is half of a character does not get past the JSON parser."""
TEXT, LIST, TOKENS, LISTS, OBJECT, SCHEMA = ("<text>", "<list>", "<tokens>", "<lists>", "<object>", "<schema>")
MESSAGE, CALL, OUTPUT, THOUGHT = ("<message>", "<call>", "<output>", "<thought>")
TAGS = (TEXT, LIST, TOKENS, LISTS, OBJECT, SCHEMA, MESSAGE, CALL, OUTPUT, THOUGHT)
"""Tags of a key's types; they appear in pydantic's locations, but are not keys."""


def _check_switch(value: Any) -> Any:
    """Refuse numbers: to a Literal, 0 is False."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "expected true or false")
    return value


Off = Annotated[Literal[False], BeforeValidator(_check_switch)]
On = Annotated[Literal[True], BeforeValidator(_check_switch)]


class Body(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )

    @model_validator(mode="before")
    @classmethod
    def _given(cls, tree: Any) -> Any:
        """Return what is there and not null, with one of the keys that are not known: it tells as much as 100,000."""
        if not isinstance(tree, dict):
            return tree
        given = {key: value for key, value in tree.items() if value is not None}
        known = {field.alias or name for name, field in cls.__pydantic_fields__.items()}
        unknown = [key for key in given if key not in known]
        for key in unknown[1:]:
            del given[key]
        return given


def limit_keys(most: int) -> BeforeValidator:
    """Refuse more keys than that; pydantic would look at each value first."""

    def check(tree: Any) -> Any:
        if isinstance(tree, dict) and len(tree) > most:
            context = {"max_length": most, "actual_length": len(tree)}
            raise PydanticCustomError("too_long", "at most {max_length} keys", context)
        return tree

    return BeforeValidator(check)


def limit_length(most: int) -> AfterValidator:
    """Refuse texts of more characters than that, all together."""

    def check(texts: list[str]) -> list[str]:
        if (length := sum(map(len, texts))) > most:
            context = {"most": most, "length": length}
            raise PydanticCustomError("long_texts", "at most {most} characters in all, not {length}", context)
        return texts

    return AfterValidator(check)


def tag_one_or_list(value: Any) -> str | None:
    if isinstance(value, Body | dict):
        return OBJECT
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else None


def choose_either(message: str) -> Discriminator:
    """Tell a text, a list and an object apart: only the given type is checked and its mistakes are reported."""
    return Discriminator(tag_one_or_list, custom_error_type="no_kind", custom_error_message=message)
