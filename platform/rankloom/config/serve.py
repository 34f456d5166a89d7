"""A deployment: which adapters of a registry are served. Read `rankloom/deploy/app.py` next."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rankloom.config.base import Frozen


def _spell_out(value: Any) -> Any:
    return [ref.strip() for ref in value.split(",")] if isinstance(value, str) else value


class ServeConfig(Frozen):
    """Adapters over one base, behind one endpoint."""

    adapters: Annotated[list[str], Field(min_length=1), BeforeValidator(_spell_out)]
    """Refs such as `bank-intents-lora@champion`, all tuned on the same base; on a command line separated by commas."""
    registry: str | None = None
    """A folder or URL; null: `$RANKLOOM_REGISTRY`, else `~/rankloom/registry`."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """The most that one request may ask for."""
    cpus: Annotated[int, Field(ge=1)] = 1
    """CPU cores reserved for the replica, and its torch threads."""
