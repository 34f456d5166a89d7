"""Serving costs of an adapter: the memory of the weights, and the time of a decode step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from rankloom.data.render import Row
from rankloom.evals.latency import decode_ms


def measure_costs(
    model: nn.Module, rows: Sequence[Row], *, pad_id: int, names: Collection[str]
) -> dict[str, float | None]:
    """Measure the costs in `names` of a base with an adapter.

    Args:
        names: `memory_bytes` and `latency_ms`, as in `search.objectives`; other names are ignored.

    Returns:
        Name -> value; `latency_ms` is None if the model keeps no KV cache.
    """
    costs: dict[str, float | None] = {}
    if "memory_bytes" in names:
        costs["memory_bytes"] = count_weight_bytes(model)
    if "latency_ms" in names:
        costs["latency_ms"] = decode_ms(model, rows, pad_id=pad_id)
    return costs


def count_weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights in memory, each counted once, quantisation constants included."""
    return sum(_count_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))


def _count_bytes(tensor: Tensor) -> int:
    held = [tensor]
    state: Any = getattr(tensor, "quant_state", None)  # bitsandbytes' nf4; nested if doubly quantised
    while state is not None:
        held += [part for part in (state.absmax, state.code, state.offset) if isinstance(part, Tensor)]
        state = getattr(state, "state2", None)
    if isinstance(scales := getattr(tensor, "SCB", None), Tensor):  # bitsandbytes' int8
        held.append(scales)
    return sum(part.numel() * part.element_size() for part in held)
