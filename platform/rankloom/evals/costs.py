"""What an adapter costs whoever serves it: the weights in memory, and the time of a decode step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from rankloom.data.render import Row
from rankloom.evals.latency import decode_ms


def measure_costs(model: nn.Module, rows: Sequence[Row], *, pad_id: int, names: Collection[str]) -> dict[str, Any]:
    """Those of `search.objectives` that are in `names`, of a base with an adapter on it; None: it has none such."""
    costs: dict[str, Any] = {}
    if "memory_bytes" in names:
        costs["memory_bytes"] = weight_bytes(model)
    if "latency_ms" in names:
        costs["latency_ms"] = decode_ms(model, rows, pad_id=pad_id)
    return costs


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they are held, each once, with the constants that quantised ones are read by."""
    return sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))


def _bytes(tensor: Tensor) -> int:
    held = [tensor]
    state: Any = getattr(tensor, "quant_state", None)  # bitsandbytes: of nf4, and doubly quantised within it
    while state is not None:
        held += [part for part in (state.absmax, state.code, state.offset) if isinstance(part, Tensor)]
        state = getattr(state, "state2", None)
    if isinstance(scales := getattr(tensor, "SCB", None), Tensor):  # of int8
        held.append(scales)
    return sum(part.numel() * part.element_size() for part in held)
