"""StagedTensors: the numbers that the host decides for a step, which one copy brings to the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes between the starts of two tensors: kernels read whole vectors."""


class StagedTensors:
    """Tensors of fixed shapes, on the device and on the host, where numpy writes them."""

    def __init__(self, device: torch.device, sizes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        starts, stop = {}, 0
        for name, (dtype, size) in sizes.items():
            starts[name] = stop
            stop += -(-math.prod(size) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(stop, dtype=torch.uint8, pin_memory=on_gpu)
        self._device = torch.zeros(stop, dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if on_gpu else None

        def part(whole: Tensor, name: str) -> Tensor:
            dtype, size = sizes[name]
            start = starts[name]
            return whole[start : start + math.prod(size) * dtype.itemsize].view(dtype).view(size)

        self.host: dict[str, np.ndarray[Any, Any]] = {name: part(self._host, name).numpy() for name in sizes}
        self.device: dict[str, Tensor] = {name: part(self._device, name) for name in sizes}

    def open(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the host's tensors, once the device has what they held."""
        if self._copied is not None:
            self._copied.synchronize()
        return self.host

    def send(self) -> dict[str, Tensor]:
        """Return the device's tensors, with what the host's hold now."""
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return self.device
