"""How much a serving engine holds and does at once. Read `rankloom/serving/engine.py` for what it does with it."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from rankloom.config.base import Frozen


class EngineConfig(Frozen):
    """An engine's sizes. What it holds beside the base: `cache_tokens` and `prefix_tokens` of keys and values, and
    `resident` adapters, of which those at work are there twice unless it computes in fp32 on a CPU."""

    rows: Annotated[int, Field(ge=1)] = 16
    """Requests that are computed at once."""
    cache_tokens: Annotated[int, Field(ge=256)] = 16384
    """Tokens whose keys and values there is room for. Where requests outgrow it, the youngest ones wait and are
    computed again. No request may be longer."""
    step_tokens: Annotated[int, Field(ge=1)] = 256
    """The most tokens that one step computes: longer prompts take several, so that others go on meanwhile."""
    prefix_tokens: Annotated[int, Field(ge=0)] = 8192
    """Tokens of earlier prompts and answers that are kept for requests that begin alike; 0: none."""
    resident: Annotated[int, Field(ge=1)] = 64
    """Adapters in memory; others are loaded when asked for, in the place of the least recently used."""
    waiting: Annotated[int, Field(ge=0)] = 256
    """Requests that may wait beyond those under way; more are refused as overload."""

    pack_weights: bool = True
    """Keep a second copy of the base's linear weights in the layout that multiplies fastest. Of use for fp32 on AMD
    processors with AVX-512, where it takes a quarter off a step of 16 rows; elsewhere there is no copy."""

    @model_validator(mode="after")
    def _every_row_moves(self) -> Self:
        if self.step_tokens < self.rows:
            raise ValueError(f"step_tokens ({self.step_tokens}) must be at least rows ({self.rows})")
        return self
