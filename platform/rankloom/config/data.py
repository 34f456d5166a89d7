"""Where rows come from, and how they become tokens with loss weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rankloom.config.base import Frozen
from rankloom.config.paths import IsPath
from rankloom.errors import ConfigError

Format = Literal["auto", "chat", "instruction", "completion", "text", "classification"]


class Source(Frozen):
    """A source of rows; a plain string is short for `{path: ...}`."""

    path: Annotated[str, IsPath(or_id=True)]
    """`builtin:bank-intents`, the id of a hub data set, or a jsonl, json, csv, tsv or parquet file, local or at an
    fsspec URL."""
    split: str | None = None
    """Split of a hub or built-in data set; null: the name of the setting (train, validation, test; retention: test)."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """A hub branch, tag or commit."""


def _spell_out(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


AnySource = Annotated[Source, BeforeValidator(_spell_out, json_schema_input_type=str | Source)]


class DataConfig(Frozen):
    """Rows to train, validate and test on, and how to render them."""

    train: AnySource = Source(path="builtin:bank-intents")
    """Rows to train on."""
    validation: AnySource | None = None
    """Rows that choose checkpoints and trials; null: split off `train`."""
    test: AnySource | None = None
    """Rows that are scored once, at the end; null: those of a built-in set, else split off `train`."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of `train` to split off when there is no validation source."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of `train` to split off when there is no test source."""
    split_seed: int = 0
    """Seed of the split."""
    format: Format = "auto"
    """Format of the rows, by columns. chat: messages; instruction: instruction, response; completion: prompt,
    completion; text: text; classification: text, label; auto: the first of these whose columns are all there. Optional
    columns: `system` (all but text), `tools` (chat, completion), `input` and `context` (instruction). Other names that
    are accepted: conversations for messages, output for response, functions for tools."""
    columns: dict[str, str] = {}
    """Column of the format -> column of the data, for example {label: category}."""
    split_special_tokens: bool = True
    """Read special tokens inside the rows' texts as plain text, except those of the template itself; off: let the
    tokenizer parse them, as it always does in rows without a chat template. Serve with the same value
    (`engine.split_special_tokens`)."""
    instruction: str | None = None
    """System prompt to put before every row."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: the tokenizer's chat template; plain: prompt, newline, completion; auto: chat if the tokenizer has one. For
    short rows plain is cheaper: a chat template's system prompt would double their tokens."""
    train_on: Literal["completion", "all"] = "completion"
    """Which tokens carry loss."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Longest row in tokens. A longer row loses the start of its prompt, never part of its completion."""
    over_long: Literal["drop", "error"] = "drop"
    """What to do with a row whose completion alone is too long; dropped rows are reported."""
    max_train_rows: Annotated[int, Field(ge=1)] | None = None
    """Train on a seeded random subset of this many rows; null: all."""

    @model_validator(mode="after")
    def _check_columns(self) -> DataConfig:
        known = [name for table in (COLUMNS, OPTIONAL) for name in sorted({c for each in table.values() for c in each})]
        if unknown := sorted(set(self.columns) - set(known)):
            raise ConfigError(f"unknown column {unknown[0]!r}; allowed: {', '.join(known)}")
        return self


COLUMNS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "instruction": ("instruction", "response"),
    "completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}
"""Columns that each format needs; `auto` takes the first format whose columns are all there."""

CONTEXT = ("input", "context")
"""Columns appended to an instruction, as in Alpaca's and Dolly's rows."""
OPTIONAL: dict[str, tuple[str, ...]] = {
    "chat": ("system", "tools"),
    "instruction": ("system", *CONTEXT),
    "completion": ("system", "tools"),
    "classification": ("system",),
    "text": (),
}
"""Columns that each format reads if they are there."""
ALIASES = {"messages": ("conversations",), "response": ("output",), "tools": ("functions",)}
"""Column -> other names for it in common formats."""
