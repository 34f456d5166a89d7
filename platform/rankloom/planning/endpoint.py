"""Before an endpoint starts: three lines on what its replicas will take, and a refusal of bases that can't fit."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rankloom import kernels
from rankloom.banks.slot_table import forecast_table_bytes
from rankloom.config.engine import EngineConfig
from rankloom.config.model import NoQuantization
from rankloom.config.serve import ServeConfig
from rankloom.engine.kv_cache import KvShape, choose_capacity, choose_prefix_capacity, find_longest
from rankloom.engine.layers import explain_obstacle, find_obstacle
from rankloom.engine.padded_cache import forecast_shape
from rankloom.errors import ConfigError, ModelError
from rankloom.events import OnEvent, PhaseStarted
from rankloom.models import choose_auto_dtype, resolve_dtype
from rankloom.models.device import choose_device
from rankloom.planning.outline import count_parameters, open_outline
from rankloom.planning.plan import find_available
from rankloom.planning.words import format_count
from rankloom.training.memory import describe_model
from rankloom.training.memory_plan import format_gb

RANK = 16
"""The rank of the adapters in a forecast; what they take is in proportion to it."""
MERGED = 4 / 64 - 1 / 64 - 4 / (64 * 256)
"""Bytes of an NF4 weight's scales in fp32, in which a GPU's merged weights keep them, above those of `memory_plan`."""


def announce_endpoint(config: ServeConfig, tell: OnEvent) -> None:
    """Report what each replica of the bank engine will take, in three lines; vLLM plans its own memory.

    Where `RAY_ADDRESS` names a cluster, the memory of its machines is unknown here.

    Args:
        config: with its base.

    Raises:
        ModelError: the engine can't serve the base's architecture.
        ConfigError: what the replicas that always run hold from their start needs more memory than there is.
    """
    if not isinstance(config.engine, EngineConfig) or config.base is None:
        return
    quantization = (config.quantization or NoQuantization()).type
    device = choose_device("cpu" if config.replicas.gpus == 0 else "auto")
    model = open_outline(config.base, config.quantization or NoQuantization())
    if obstacle := find_obstacle(model):
        raise ModelError(explain_obstacle(model, obstacle))
    available = None if os.environ.get("RAY_ADDRESS") else find_available(device, config.replicas.min)
    memory = forecast_replica(config, model, device, available)
    have = "the cluster's machines are unknown here" if available is None else f"{format_gb(available)} are free"
    total = sum(count_parameters(model).values())
    for line in (
        f"model   {config.base.id}: {format_count(total)} parameters, quantization {quantization}",
        f"memory  each of {config.replicas.min} replica(s): {memory.describe()}; {have} for each",
        f"load    {config.engine.resolve_num_seqs(on_gpu=device.type == 'cuda')} sequences at once in a replica, "
        f"{config.engine.max_cpu_loras} adapters in memory",
    ):
        tell(PhaseStarted("plan", line))
    if available is None:
        return
    if memory.weights > available:
        hint = "quantization=nf4, " if quantization == "none" else ""
        raise ConfigError(
            f"base={config.base.id}, quantization={quantization}: the weights take {format_gb(memory.weights)} in each "
            f"of {config.replicas.min} replica(s), and {format_gb(available)} are free for each on the {device.type}; "
            f"set {hint}replicas.min=1 or a smaller base"
        )
    if device.type == "cuda" and memory.weights + memory.cache > available:
        raise ConfigError(
            f"engine.kv_cache_tokens={config.engine.kv_cache_tokens}: takes {format_gb(memory.cache)} at the start, "
            f"and {format_gb(available - memory.weights)} are free beside the base; set fewer, or null for what fits"
        )


@dataclass(frozen=True)
class ReplicaMemory:
    """What a replica holds when it is full."""

    weights: float
    """In bytes."""
    shape: KvShape
    num_seqs: int
    """Most sequences that run."""
    cache_tokens: int | None
    """Those of the KV cache; None: unknown here, as they follow from the device's memory."""
    prefix_tokens: int | None
    adapters: float
    """In bytes, of `num_adapters` of rank `RANK` on all linears."""
    num_adapters: int

    @property
    def cache(self) -> float:
        """Bytes of the KV cache; 0 where they are unknown."""
        return (self.cache_tokens or 0) * self.shape.bytes_per_token

    def describe(self) -> str:
        """Return its parts, for users."""
        parts = [f"weights {format_gb(self.weights)}"]
        if self.cache:
            parts.append(f"KV cache {format_gb(self.cache)} for {self.cache_tokens:,} tokens when full")
        if states := self.shape.count_state_bytes(self.num_seqs):
            parts.append(f"states {format_gb(states)} of {self.num_seqs} sequences")
        if self.prefix_tokens:
            prefixes = self.prefix_tokens * self.shape.bytes_per_kept_token
            parts.append(f"prefixes {format_gb(prefixes)} for {self.prefix_tokens:,} tokens")
        return ", ".join([*parts, f"adapters {format_gb(self.adapters)} for {self.num_adapters} of rank {RANK}"])


def forecast_replica(
    config: ServeConfig, model: PreTrainedModel, device: torch.device, available: float | None
) -> ReplicaMemory:
    """Forecast the memory of a replica of the bank engine.

    Args:
        config: with its base.
        model: the base, which may be without weights.
        available: bytes; None: unknown.
    """
    assert config.base is not None
    assert isinstance(config.engine, EngineConfig)
    engine, is_fast = config.engine, kernels.use_on(device)
    quantization = (config.quantization or NoQuantization()).type
    dtype = resolve_dtype(config.base.dtype, choose_auto_dtype(device))
    shape = describe_model(
        model, "all-linear", experts=False, predicted_share=0.0, quantization=quantization, dtype=dtype, device=device
    )
    weights = shape.base_bytes + (is_fast and quantization == "nf4") * MERGED * (shape.num_weights - shape.num_other)
    tokens, kept = engine.kv_cache_tokens, engine.prefix_cache_tokens
    num_seqs = engine.resolve_num_seqs(on_gpu=device.type == "cuda")
    try:
        kept_shape = forecast_shape(model, dtype)
    except RuntimeError:  # it looks at values, and an outline has none
        kept_shape, tokens, kept = KvShape((), dtype, device), None, None
    if kept_shape.layers and (available is not None or device.type == "cpu"):
        free = None if device.type == "cpu" else max(0.0, (available or 0.0) - weights)
        tokens = tokens or choose_capacity(kept_shape, free, num_seqs, find_longest(model))
        kept = choose_prefix_capacity(kept_shape, free) if kept is None else kept
    num_adapters = engine.max_cpu_loras
    if is_fast:
        adapters = forecast_table_bytes(shape.linears, num_adapters, RANK, value_bytes=dtype.itemsize)
    else:
        adapters = num_adapters * shape.count_adapter_numbers(RANK, dora=False) * torch.float32.itemsize
    return ReplicaMemory(weights, kept_shape, num_seqs, tokens, kept, adapters, num_adapters)
