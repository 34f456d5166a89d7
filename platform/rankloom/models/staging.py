"""Copies between the host and a device, through one buffer each: a step's arrays there, a slot's state back.

`StagedTensors` keeps its buffers, for arrays of the same shapes at every step; `upload` takes arrays of any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes between the starts of two tensors: kernels read whole vectors."""


class StagedTensors:
    """Tensors of fixed shapes, on the device and on the host, where numpy writes them."""

    def __init__(self, device: torch.device, sizes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        like = {name: torch.empty(size, dtype=dtype, device="meta") for name, (dtype, size) in sizes.items()}
        num_bytes, on_gpu = count_bytes(like.values()), device.type == "cuda"
        self._host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if on_gpu else None
        self.host: dict[str, np.ndarray[Any, Any]] = {
            name: part.numpy() for name, part in _split(self._host, like).items()
        }
        self.device = _split(self._device, like)

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


def upload(arrays: Mapping[str, np.ndarray], device: torch.device, into: Tensor | None = None) -> dict[str, Tensor]:
    """Return the arrays as tensors on a device.

    Args:
        into: the buffer that an `upload` of arrays of these shapes has filled; its tensors get the new values. None: a
            new one.
    """
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    if device.type == "cpu" and into is None:
        return tensors
    num_bytes = count_bytes(arrays.values())
    # torch's cache of pinned memory keeps a buffer from reuse until the copy from it is done
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device) if into is None else into
    for part, tensor in zip(_split(pinned, tensors).values(), tensors.values(), strict=True):
        part.copy_(tensor)
    buffer.copy_(pinned, non_blocking=True)
    return _split(buffer, tensors)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors of one dtype and device in the host's memory; a GPU's come at once, beside its work."""
    device = tensors[0].device
    if device.type != "cuda":
        return [tensor.to("cpu", copy=True) for tensor in tensors]
    sizes = [tensor.numel() for tensor in tensors]
    pinned = torch.empty(sum(sizes), dtype=tensors[0].dtype, pin_memory=True)
    copies = [part.view(t.shape) for part, t in zip(pinned.split(sizes), tensors, strict=True)]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
    stream.synchronize()
    return copies


def count_bytes(items: Iterable[np.ndarray | Tensor]) -> int:
    """Return the bytes of the buffer that holds the arrays or tensors."""
    return sum(-(-item.nbytes // ALIGNMENT) * ALIGNMENT for item in items)


def _split(buffer: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return views of a buffer, of the dtypes and shapes of `like`."""
    views, start = {}, 0
    for name, item in like.items():
        views[name] = buffer[start : start + item.nbytes].view(item.dtype).view(item.shape)
        start += count_bytes([item])
    return views
