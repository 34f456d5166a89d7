"""Pauses: how long one thread of a serving process keeps the others waiting. The settings are of the whole process."""

from __future__ import annotations

import gc
import sys

SWITCH_S = 0.0005
"""How long one Python thread keeps others waiting; the longest gaps between tokens while adapters are loaded were
measured to be a third of those at Python's 5 ms."""


def shorten_pauses() -> None:
    """Have threads take turns often, and keep the garbage collector from the objects that there are now.

    A full collection visits every object, of torch and transformers alone half a million, and no thread runs meanwhile:
    without this a stream waits half a second for it.
    """
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
    gc.freeze()


def allow_pauses() -> None:
    """Let the collector have its objects back, so that what has served can be collected."""
    gc.unfreeze()
