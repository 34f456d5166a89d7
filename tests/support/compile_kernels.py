"""Run as a script, with the names of test modules: calls each `launch_*` of them while triton compiles for an H100.

No GPU is needed: kernels are compiled by ptxas, in the variants that their launchers ask for, and not run.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from typing import Any

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


def main(modules: list[str]) -> None:
    """Print, for each module, the number of kernels that compiled, or the trace of the first that did not."""
    run, num_kernels = JITFunction.run, 0

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_kernels
        num_kernels += 1
        return run(self, *args, **kwargs | {"warmup": True})

    driver.set_active(_H100())
    JITFunction.run = compile_only
    found: dict[str, int | str] = {}
    for module in modules:
        num_kernels = 0
        try:
            for name, launch in vars(importlib.import_module(module)).items():
                if name.startswith("launch_"):
                    launch()
            found[module] = num_kernels
        except Exception:
            found[module] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
