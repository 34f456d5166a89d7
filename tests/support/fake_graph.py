"""A fake CUDA graph: records the operations of a function on any device, and repeats them on the same tensors.

As on CUDA, a replay sees nothing of Python: an input that is not in a tensor that stayed keeps its first value. What
CUDA refuses while it records is refused here: waiting for a value of the device, and tensors of the host's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_pinned", "equal", "_unique2", "unique_dim"}
_FROM_HOST = {"lift_fresh", "lift_fresh_copy"}


class FakeGraph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.num_replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, results in self.operations:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, torch.Tensor)]
            for result, new in zip(results, again, strict=True):
                if not (result is new or func.is_view):
                    result.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self._graph = graph
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def undo(self) -> None:
        """Give tensors that operations changed their values from before: recording computes nothing."""
        for storage, before in self._before.values():
            storage.copy_(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose() and torch.is_inference_mode_enabled():
            with self:
                return func.decompose(*args, **kwargs)
        name = func.__name__.split(".")[0]
        indices = tree_leaves(args[1:2]) if name in ("index", "index_put_", "index_put") else []
        if name in _WAITS or any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} waits for the device")
        if name in _FROM_HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} is of the host's memory")
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    if isinstance(tensor, torch.Tensor):
                        storage = tensor.untyped_storage()
                        self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        found = func(*args, **kwargs)
        results = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        self._graph.operations.append((func, args, kwargs, results))
        return found


@contextmanager
def _record(graph: FakeGraph, **_: Any) -> Iterator[None]:
    """Stands in for `torch.cuda.graph`."""
    with _Recorder(graph) as recorder:
        yield
    recorder.undo()


def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `torch.cuda` record and replay fake graphs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", _record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
