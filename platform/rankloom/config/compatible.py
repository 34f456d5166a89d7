"""COMPATIBLE: the one table of what goes with what; it drives validation, the docs and the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Compatibility:
    """What one method can be combined with.

    quantization: bases it trains on. loraplus: whether `optim.loraplus_ratio` means anything. fusable: whether it
    can be a host's member. servable: how its result becomes a PEFT folder. parallel: how N workers share it.
    """

    quantization: frozenset[str]
    loraplus: bool
    fusable: bool
    servable: Literal["itself", "rank pattern", "extracted"]
    parallel: Literal["ddp", "fsdp"]


_ANY = frozenset({"none", "int8", "nf4"})
_PLAIN = frozenset({"none"})

COMPATIBLE: dict[str, Compatibility] = {
    "full": Compatibility(_PLAIN, loraplus=False, fusable=False, servable="extracted", parallel="fsdp"),
    "lora": Compatibility(_ANY, loraplus=True, fusable=True, servable="itself", parallel="ddp"),
    "dora": Compatibility(_ANY, loraplus=True, fusable=True, servable="itself", parallel="ddp"),
    "adalora": Compatibility(_ANY, loraplus=False, fusable=False, servable="rank pattern", parallel="ddp"),
    "galore": Compatibility(_PLAIN, loraplus=False, fusable=False, servable="extracted", parallel="ddp"),
    "lisa": Compatibility(_PLAIN, loraplus=False, fusable=False, servable="extracted", parallel="ddp"),
}
