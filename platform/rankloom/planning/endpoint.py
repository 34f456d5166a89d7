"""Before an endpoint starts: three lines on what its replicas will take, and a refusal of bases that can't fit."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel

from rankloom.config.engine import VllmConfig
from rankloom.config.model import NoQuantization
from rankloom.config.serve import ServeConfig
from rankloom.engine.kv_cache import CPU_TOKENS, GPU_SHARE
from rankloom.errors import ConfigError
from rankloom.events import OnEvent, PhaseStarted
from rankloom.models import choose_auto_dtype, resolve_dtype
from rankloom.models.device import choose_device
from rankloom.planning.outline import count_parameters, open_outline
from rankloom.planning.plan import find_available
from rankloom.training.memory import describe_model
from rankloom.training.memory_plan import gigabytes


def announce_endpoint(config: ServeConfig, tell: OnEvent) -> None:
    """Report what each replica of the bank engine will take, in three lines; vLLM plans its own memory.

    Where `RAY_ADDRESS` names a cluster, the memory of its machines is unknown here.

    Args:
        config: with its base.

    Raises:
        ConfigError: the weights of the replicas that always run need more memory than there is.
    """
    if isinstance(config.engine, VllmConfig) or config.base is None:
        return
    quantization = config.quantization or NoQuantization()
    device = choose_device("cpu" if config.replicas.gpus == 0 else "auto")
    dtype = resolve_dtype(config.base.dtype, choose_auto_dtype(device))
    model = open_outline(config.base, quantization)
    weights = describe_model(
        model, "all-linear", experts=False, predicted_share=0.0, quantization=quantization.type, dtype=dtype,
        device=device,
    ).base_bytes  # fmt: skip
    available = None if os.environ.get("RAY_ADDRESS") else find_available(device, config.replicas.min)
    per_token = count_cache_bytes(model, dtype)
    tokens = config.engine.kv_cache_tokens or _choose_tokens(device, available, weights, per_token)
    cache = "" if tokens is None else f", KV cache {gigabytes(tokens * per_token)} for {tokens:,} tokens when full"
    have = "the cluster's machines are unknown here" if available is None else f"{gigabytes(available)} are free"
    total = sum(count_parameters(model).values())
    for line in (
        f"model   {config.base.id}: {total / 1e6:,.4g} M parameters, quantization {quantization.type}",
        f"memory  each of {config.replicas.min} replica(s): weights {gigabytes(weights)}{cache}; {have} for each",
        f"load    {config.engine.num_seqs(on_gpu=device.type == 'cuda')} sequences at once in a replica, "
        f"{config.engine.max_cpu_loras} adapters in memory",
    ):
        tell(PhaseStarted("plan", line))
    if available is not None and weights > available:
        hint = "quantization=nf4, " if quantization.type == "none" else ""
        raise ConfigError(
            f"base={config.base.id}, quantization={quantization.type}: the weights take {gigabytes(weights)} in each "
            f"of {config.replicas.min} replica(s), and {gigabytes(available)} are free for each on the {device.type}; "
            f"set {hint}replicas.min=1 or a smaller base"
        )


def count_cache_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of a token."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * dtype.itemsize)


def _choose_tokens(device: torch.device, available: float | None, weights: float, per_token: int) -> int | None:
    """Return the cache's default size, as `engine.kv_cache` chooses it."""
    if device.type == "cpu":
        return CPU_TOKENS
    return None if available is None else int(GPU_SHARE * max(0.0, available - weights)) // per_token
