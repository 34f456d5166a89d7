"""Tests that need a CUDA device. `RANKLOOM_GPU_TESTS_ON=cpu` tries those that can be tried without one.

On a CPU the fast path is forced, and computes by its references.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from rankloom import kernels

DEVICE = torch.device(os.environ.get("RANKLOOM_GPU_TESTS_ON", "cuda"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Return the device, on which the fast path is used."""
    if DEVICE.type == "cpu":
        with kernels.everywhere():
            yield DEVICE
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert kernels.use_on(DEVICE), "this GPU has no triton"
    yield torch.device("cuda", 0)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """Return a device that is a GPU, for what a CPU has nothing of."""
    if device.type == "cpu":
        pytest.skip("needs a CUDA device")
    return device
