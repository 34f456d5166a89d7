"""What a step frees stays with the process."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

SOURCE = next(path for path in sys.path if path.endswith("platform"))
LOOP = """
import resource, sys
sys.path.insert(0, {source!r})
import numpy as np
{setup}
def count_new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        parts = [np.ones(750_000) for _ in range(4)]  # 24 MB, written
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
count_new_pages()
print(count_new_pages())
"""


def count(setup: str) -> int:
    code = LOOP.format(source=SOURCE, setup=setup)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_what_is_freed_is_used_again() -> None:
    of_a_round = 24_000_000 // 4096
    assert count("from rankloom.engine.heap import keep_freed_memory; keep_freed_memory()") < of_a_round
    assert count("") > 5 * of_a_round  # else there is nothing to mend
