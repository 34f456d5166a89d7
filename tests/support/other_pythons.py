"""Interpreters with clients' libraries: RANKLOOM_TEST_CLIENTS names them, with `:` between; some exclude each other."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest


def find_python(*modules: str) -> str:
    """Return an interpreter that has these modules; skip the test where there is none."""
    pythons = [*filter(None, os.environ.get("RANKLOOM_TEST_CLIENTS", "").split(os.pathsep)), sys.executable]
    for python in pythons:
        if all(_has(python, module) for module in modules):
            return python
    pytest.skip(f"no interpreter of RANKLOOM_TEST_CLIENTS has {' and '.join(modules)}")


@cache
def _has(python: str, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0
