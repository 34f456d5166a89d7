"""Copies between the host and a device, through one pinned buffer each: a step's arrays there, a slot's state back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes; what vectorised kernels ask of a tensor's address."""


def upload(arrays: Mapping[str, np.ndarray], device: torch.device, into: Tensor | None = None) -> dict[str, Tensor]:
    """Return the arrays as tensors on a device.

    Args:
        into: the buffer that an `upload` of arrays of these shapes has filled; its tensors get the new values. None: a
            new one.
    """
    if device.type == "cpu" and into is None:
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    size = buffer_size(arrays)
    # torch's cache of pinned memory keeps a buffer from reuse until the copy from it is done
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    buffer = torch.empty(size, dtype=torch.uint8, device=device) if into is None else into
    for part, array in zip(_parts(pinned, arrays).values(), arrays.values(), strict=True):
        part.copy_(torch.from_numpy(np.ascontiguousarray(array)))
    buffer.copy_(pinned, non_blocking=True)
    return _parts(buffer, arrays)


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


def buffer_size(arrays: Mapping[str, np.ndarray]) -> int:
    """Return the bytes of the buffer that holds the arrays."""
    return sum(_aligned(array.nbytes) for array in arrays.values())


def _parts(buffer: Tensor, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return views of a buffer, one an array."""
    found, offset = {}, 0
    for name, array in arrays.items():
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        found[name] = buffer[offset : offset + array.nbytes].view(dtype).view(array.shape)
        offset += _aligned(array.nbytes)
    return found


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
