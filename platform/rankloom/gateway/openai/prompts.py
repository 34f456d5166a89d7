"""One prompt or several, as texts or as token ids."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from rankloom.engine.jobs import Prompt
from rankloom.gateway.openai.body import LIST, LISTS, TEXT, TOKENS, Text, tag_one_or_list


def _tag_prompt(value: Any) -> str | None:
    """Return the tag of a prompt's type, by its first item."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, int):
        return TOKENS
    return LISTS if isinstance(first, list) else tag_one_or_list(value)


Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[
    Annotated[Text, Tag(TEXT)]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag(LIST)]
    | Annotated[Tokens, Tag(TOKENS)]
    | Annotated[list[Tokens], Field(min_length=1, fail_fast=True), Tag(LISTS)],
    Discriminator(
        _tag_prompt,
        custom_error_type="no_kind",
        custom_error_message="expected a text, a list of texts, a list of token ids or a list of such lists",
    ),
]


def list_prompts(given: Any) -> tuple[Prompt, ...]:
    """Return the prompts that are given as `Prompts`."""
    prompts: list[Any] = given if isinstance(given, list) else [given]
    if isinstance(prompts[0], int):
        prompts = [prompts]
    return tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts)
