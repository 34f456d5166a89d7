"""The choice of an engine for `engine.type=auto`."""

from __future__ import annotations

from rankloom.config.engine import AutoEngineConfig, EngineConfig, VllmConfig
from rankloom.engine.vllm.server import find_vllm
from rankloom.errors import ConfigError


def choose_engine(
    config: AutoEngineConfig, *, on_gpu: bool, obstacle: str | None = None
) -> tuple[EngineConfig | VllmConfig, str]:
    """Return the engine's settings, and why it is that one.

    Args:
        on_gpu: whether the replicas have a GPU.
        obstacle: why vLLM can't serve what is to be served; None: it can.
    """
    if not on_gpu:
        return config.bank, "bank, as there is no GPU"
    if obstacle is not None:
        return config.bank, f"bank, as {obstacle}"
    try:
        python, version = find_vllm(config.vllm.python)
    except ConfigError as error:
        return config.bank, f"bank, as vLLM has no environment here ({error})"
    return config.vllm, f"vllm, as there is a GPU and {python} has vLLM {version}"
