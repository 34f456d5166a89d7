"""Fused operations for CUDA; each is one torch op, `rankloom::name`, so that one call is seen as one operation.

A family has two files. `<family>.py` defines ops with `op`: plain torch, which is the reference and which a CPU runs.
`triton/<family>.py` has a function of each op's name that CUDA runs; it is imported with the first CUDA tensor, and
triton with it. Tests in tests/unit/kernels hold the two together in triton's interpreter.

An op has no gradient of its own; a `torch.autograd.Function` beside it calls the op of its backward pass. Callers ask
`use_on` which path to take, the fast or the plain one.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

FAST_DTYPES = (torch.bfloat16, torch.float32)
"""Dtypes of a base on which the fast path computes."""
LAUNCHES: dict[str, int] = {}
"""Op -> number of kernels that one call launches on CUDA, where that is not 1."""

_everywhere = False
_library = torch.library.Library("rankloom", "FRAGMENT")


def use_on(device: torch.device) -> bool:
    """Return whether the fast path is used on a device: on CUDA, where triton is installed."""
    return _everywhere or (device.type == "cuda" and _has_triton())


@contextmanager
def everywhere() -> Iterator[None]:
    """Use the fast path on any device inside the context, in all threads; a CPU computes it by the references."""
    global _everywhere
    before, _everywhere = _everywhere, True
    try:
        yield
    finally:
        _everywhere = before


def op(
    *, name: str | None = None, mutates: tuple[str, ...] = (), launches: int = 1
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Register the decorated function as the torch op `rankloom::<name>` and return the op.

    The function is the reference. CUDA calls the one of its name in `rankloom.kernels.triton.<family>` with the same
    arguments. An op returns none of its arguments.

    Args:
        name: of the op and of the function for CUDA; None: the decorated function's.
        mutates: names of the tensors that it changes in place.
        launches: number of kernels that a call launches on CUDA.
    """

    def register(reference: Callable[P, T]) -> Callable[P, T]:
        op_name, family = name or reference.__name__, reference.__module__.rsplit(".", 1)[-1]
        if launches != 1:
            LAUNCHES[op_name] = launches

        def launch(*args: P.args, **kwargs: P.kwargs) -> T:
            result: T = getattr(importlib.import_module(f"{__name__}.triton.{family}"), op_name)(*args, **kwargs)
            return result

        # not `torch.library.custom_op`, whose calls take 70 us instead of 10, and import torch's compiler
        _library.define(op_name + torch.library.infer_schema(reference, mutates_args=mutates))
        _library.impl(op_name, reference, "CPU")
        _library.impl(op_name, launch, "CUDA")
        torch.library.register_fake(f"rankloom::{op_name}", reference, lib=_library)  # computes shapes, without values
        made: Callable[P, T] = getattr(torch.ops.rankloom, op_name).default
        return made

    return register


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
