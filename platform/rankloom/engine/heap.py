"""The heap of a process that computes steps on a CPU."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
KEPT_BYTES, LARGEST_BYTES = 256 * 2**20, 32 * 2**20
"""How much freed memory is kept, and the largest tensor that is taken from it, which is glibc's limit."""


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step's tensors; elsewhere do nothing.

    Otherwise it gives tens of MB of logits and probabilities back after each step, and the next one's are new pages,
    which the system clears one by one: up to 10 ms for 16 rows of 49,152 logits.
    """
    try:
        set_parameter = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    set_parameter(M_MMAP_THRESHOLD, LARGEST_BYTES)
    set_parameter(M_TRIM_THRESHOLD, KEPT_BYTES)
