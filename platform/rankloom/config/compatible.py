"""COMPATIBLE: the one table of allowed combinations, which drives validation, docs and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Compatibility:
    """The settings that one method can be combined with.

    Attributes:
        quantization: quantisations of the bases that it can train on.
        loraplus: whether `optim.loraplus_ratio` applies to it.
        fusable: whether its trials can train together in a host.
        servable: how its result becomes a PEFT folder.
        parallel: how several workers share its training.
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
