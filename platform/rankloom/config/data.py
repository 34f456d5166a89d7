"""Which rows, and how they become tokens with loss weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rankloom.config.base import Frozen
from rankloom.errors import ConfigError

Format = Literal["auto", "chat", "instruction", "completion", "text", "classification"]


class Source(Frozen):
    """Where rows come from; a plain string is short for `{path: ...}`."""

    path: str
    """`builtin:bank-intents`, a hub data set's id, or a jsonl, json, csv, tsv or parquet file, local or on an fsspec
    URL."""
    split: str | None = None
    """The split of a hub or built-in data set; null: the key's own name (train, validation, test; retention: test)."""
    subset: str | None = None
    """A hub data set's configuration name."""
    revision: str | None = None
    """A hub branch, tag or commit."""


def _spell_out(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


AnySource = Annotated[Source, BeforeValidator(_spell_out, json_schema_input_type=str | Source)]


class DataConfig(Frozen):
    """Rows to train, validate and test on, and how they are rendered."""

    train: AnySource = Source(path="builtin:bank-intents")
    """Rows to train on."""
    validation: AnySource | None = None
    """Rows that choose checkpoints and trials; None: split off `train`."""
    test: AnySource | None = None
    """Rows that are only ever scored at the end; None: a built-in set's own, else split off `train`."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of `train` to split off where there is no validation source."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of `train` to split off where there is no test source."""
    split_seed: int = 0
    """Seed of the split."""
    format: Format = "auto"
    """chat: messages; instruction: instruction, response; completion: prompt, completion; text: text;
    classification: text, label. auto: by the columns. All but text also read a column `system`, chat and completion
    `tools`, and instruction `input` and `context`, which follow the instruction. Other names: conversations for
    messages, output for response, functions for tools."""
    columns: dict[str, str] = {}
    """Renames: the format's column -> the data's, for example {label: category}."""
    split_special_tokens: bool = True
    """Special tokens that the rows' texts hold are kept as text, apart from the template's own; off: they are what the
    tokenizer makes of them, as they always are in rows without a chat template. As an engine's setting of this name."""
    instruction: str | None = None
    """A system prompt put before every row."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: the tokenizer's chat template; plain: prompt, newline, completion. auto: chat where there is one."""
    train_on: Literal["completion", "all"] = "completion"
    """Which tokens carry loss."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Longest row, in tokens. A longer row loses the start of its prompt, never a part of its completion."""
    over_long: Literal["drop", "error"] = "drop"
    """What becomes of a row whose completion alone does not fit; what was dropped is reported."""
    max_train_rows: Annotated[int, Field(ge=1)] | None = None
    """Train on a seeded random subset of this many rows; None: all."""

    @model_validator(mode="after")
    def _columns_are_known(self) -> DataConfig:
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
"""The columns each format reads; `auto` takes the first format whose columns are all there."""

CONTEXT = ("input", "context")
"""Columns that follow an instruction in its turn, as Alpaca's and Dolly's rows have them."""
OPTIONAL: dict[str, tuple[str, ...]] = {
    "chat": ("system", "tools"),
    "instruction": ("system", *CONTEXT),
    "completion": ("system", "tools"),
    "classification": ("system",),
    "text": (),
}
"""The columns that each format reads where they are there."""
ALIASES = {"messages": ("conversations",), "response": ("output",), "tools": ("functions",)}
"""Other names of columns, in common formats."""
