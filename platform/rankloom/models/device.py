"""A process's device: which it is, what memory is left there, and whether it is still to be had."""

from __future__ import annotations

import torch

from rankloom.errors import ConfigError


def local_device(wanted: str) -> torch.device:
    """This process's torch device."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device=cuda: torch finds no CUDA device here; set compute.device=cpu, or auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def free_cuda_bytes(device: torch.device) -> float:
    """What torch can still allocate there, what it holds and does not use included, within this process's part."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    mine = torch.cuda.get_per_process_memory_fraction(device.index) * total
    return max(0.0, min(free + torch.cuda.memory_reserved(device), mine) - allocated)


def is_lost(error: BaseException) -> bool:
    """Whether an error has cost this process its device: only another process can compute on that.

    cuBLAS and cuDNN tell of a lost context with plain RuntimeErrors, as they tell of what is wrong with one call alone;
    but on a lost one, nothing else works either.
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
