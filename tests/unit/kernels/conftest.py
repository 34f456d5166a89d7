"""Where there is a GPU, these tests compile the kernels and run them there; elsewhere triton interprets them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import wraps
from inspect import isfunction
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from rankloom.kernels import triton as families


def _run_on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes with copies on the GPU of what it is given, and changes what they change."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if not tensors or any(x.is_cuda or isinstance(x, FakeTensor) for x in tensors.values()):
            return function(*args, **kwargs)
        copies = {key: x.cuda() for key, x in tensors.items()}
        result = function(*tree_map(lambda x: copies.get(id(x), x), args), **kwargs)
        for key, x in tensors.items():
            if (changed := copies[key].cpu()).ne(x).any():
                x.copy_(changed)
        return tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, result)

    return run


if torch.cuda.is_available():
    for info in pkgutil.iter_modules(families.__path__):
        family = importlib.import_module(f"{families.__name__}.{info.name}")
        for name, function in list(vars(family).items()):
            if isfunction(function) and function.__module__ == family.__name__ and not name.startswith("_"):
                setattr(family, name, _run_on_gpu(function))
