"""A process's device: its choice, its free memory, and whether it still works."""

from __future__ import annotations

import torch

from rankloom.errors import ConfigError


def choose_device(wanted: str) -> torch.device:
    """Return this process's torch device.

    Raises:
        ConfigError: `wanted` is cuda, but there is no CUDA device.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device=cuda: torch finds no CUDA device here; set compute.device=cpu, or auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    """Return its name with its free memory, or a CPU's threads."""
    if device.type != "cuda":
        return f"the CPU, {torch.get_num_threads()} threads"
    free, total = torch.cuda.mem_get_info(device)
    return f"{torch.cuda.get_device_name(device)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"


def free_cuda_bytes(device: torch.device) -> float:
    """Return the bytes that torch can still allocate, within this process's fraction and with its unused reserve."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    mine = torch.cuda.get_per_process_memory_fraction(device.index) * total
    return max(0.0, min(free + torch.cuda.memory_reserved(device), mine) - allocated)


def is_lost(error: BaseException) -> bool:
    """Return whether an error means that this process has lost its device; only a new process can use it again.

    cuBLAS and cuDNN report a lost context with a plain RuntimeError, like an error of one call; but on a lost context
    every other call fails too.
    """
    if isinstance(error, torch.AcceleratorError):
        return True
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
