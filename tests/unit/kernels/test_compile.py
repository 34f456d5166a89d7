"""The kernels compile for an H100, in the variants that `launch_*` of the tests beside this one ask for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODULES = [file.stem for file in sorted(HERE.glob("test_*.py")) if "\ndef launch_" in file.read_text()]


@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_for_an_h100(module: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    script = Path(__file__).parents[2] / "support" / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), module], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 0
