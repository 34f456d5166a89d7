"""Run as a script, with the name of a test module: calls each `launch_*` of it while triton compiles for an H100.

No GPU is needed: kernels are compiled by ptxas, in the variants that their launchers ask for, and not run.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class _H100:
    """As much of a driver as compiling takes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(module: str) -> None:
    run, num_kernels = JITFunction.run, 0

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_kernels
        num_kernels += 1
        return run(self, *args, **kwargs | {"warmup": True})

    driver.set_active(_H100())
    JITFunction.run = compile_only
    for name, launch in vars(importlib.import_module(module)).items():
        if name.startswith("launch_"):
            launch()
    print(f"{num_kernels} kernels compiled by triton {triton.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
