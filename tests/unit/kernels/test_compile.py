"""The kernels compile for an H100, in the variants that `launch_*` of the tests beside this one ask for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODULES = [file.stem for file in sorted(HERE.glob("test_*.py")) if "\ndef launch_" in file.read_text()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int | str]:
    """The number of kernels of each module, or its error, from one process without triton's interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    script = HERE.parents[1] / "support" / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), *MODULES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int | str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_for_an_h100(module: str, compiled: dict[str, int | str]) -> None:
    assert isinstance(compiled[module], int), compiled[module]
    assert compiled[module] > 0
