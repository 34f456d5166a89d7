"""Which path is taken where, and what an op of ours is for torch."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch._subclasses import FakeTensorMode

from rankloom import kernels
from rankloom.kernels import norms


def test_the_fast_path_is_cudas_unless_it_is_asked_for() -> None:
    cpu = torch.device("cpu")
    assert not kernels.use_on(cpu)
    with kernels.everywhere():
        assert kernels.use_on(cpu)
    assert not kernels.use_on(cpu)
    assert kernels.use_on(torch.device("cuda"))


def test_an_op_has_shapes_without_values() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        y, inverse = norms.rms_norm_forward(torch.empty(2, 3, 8, dtype=torch.bfloat16), torch.empty(8), 1e-5)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 8), torch.bfloat16, "cuda")
    assert (inverse.shape, inverse.dtype) == ((6,), torch.float32)


def test_triton_is_not_imported_without_a_cuda_tensor() -> None:
    code = (
        "import sys, torch; from rankloom.kernels import norms; "
        "norms.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5); print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
