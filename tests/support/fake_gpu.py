"""A fake GPU: tensors that claim to be on `cuda:0`, compute on the CPU, and refuse operations with CPU tensors.

It checks devices as CUDA does: an operation on both devices raises, except those that CUDA allows (copies, numbers
without dimensions, indices). Values are those of the CPU, so whole runs succeed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fake_graph import fake_graphs

GPU = torch.device("cuda", 0)
_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class OnGpu(torch.Tensor):
    """A tensor whose values are in another tensor, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_subclass(cls, held)  # C++ sees a CPU tensor, which has autograd's threads
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    device = property(lambda _: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda _: True)  # type: ignore[assignment]

    @property
    def data(self) -> OnGpu:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        assert isinstance(value, OnGpu), "a parameter's device does not change so"
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            made = type(self)(self.held.clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if is_parameter else made
        return memo[id(self)]


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, OnGpu)]
    device = kwargs.get("device")
    if func is _aten.copy_.default:
        there = isinstance(args[0], OnGpu)
    elif device is None or func._opname.startswith("new_") or func._opname.endswith("_like"):
        there = bool(ours)  # backward passes ask for the device that C++ sees
    else:
        there = device.type == "cuda"
    if func in _INDEXED and isinstance(args[0], OnGpu):
        tensors = [args[0], *args[2:3]]
    if func not in _COPIES and ours and any(not isinstance(t, OnGpu) and t.dim() for t in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({func})")
    if device is not None and device.type == "cuda":
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    args, kwargs = tree_map_only(OnGpu, lambda t: t.held, (args, kwargs))
    found = func(*args, **kwargs)
    known = {id(t.held): t for t in ours}  # a tensor changed in place keeps its identity

    def ours_of(tensor: torch.Tensor) -> OnGpu:
        return known[id(tensor)] if id(tensor) in known else OnGpu(tensor)

    return tree_map_only(torch.Tensor, ours_of, found) if there else found


class _Stream:
    """Work in order: a stream that is always done."""

    def __init__(self, device: Any = None) -> None: ...

    def wait_stream(self, other: _Stream) -> None: ...

    def synchronize(self) -> None: ...


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._can_decompose():  # in inference mode; otherwise autograd has decomposed it
            with self:
                return func.decompose(*args, **kwargs or {})
        return _compute(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Calls that C++ would decide wrongly, because it sees our tensors as CPU tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        args = tuple(GPU if _is_any_gpu(value) else value for value in args)
        kwargs = {name: GPU if _is_any_gpu(value) else value for name, value in kwargs.items()}
        first = args[0] if args else None
        if isinstance(first, OnGpu):
            if func is torch.Tensor.tolist:
                return first.held.tolist()
            if func is torch.Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
            if func is torch.Tensor.cpu or (func is torch.Tensor.to and _to_cpu(*args[1:], **kwargs)):
                rest = {} if func is torch.Tensor.cpu else kwargs | {"copy": True}
                return first.held.detach().to(*args[1:], **rest) if rest else first.held.detach().clone()
        return func(*args, **kwargs)


def _is_any_gpu(value: Any) -> bool:
    return value == "cuda" if isinstance(value, str) else isinstance(value, torch.device) and value.type == "cuda"


def _to_cpu(*args: Any, **kwargs: Any) -> bool:
    kwargs.pop("copy", None)
    device = torch._C._nn._parse_to(*args, **kwargs)[0]
    return device is not None and device.type == "cpu"


@contextmanager
def _active() -> Iterator[None]:
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # makes `torch.tensor` move its result by a call that is visible here
    try:
        with _Dispatch(), _Calls():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)


class _Event:
    """Stands in for `torch.cuda.Event`: nothing is ever pending."""

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


@contextmanager
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Give this process one GPU, in all threads that it starts, inside the context."""
    run = threading.Thread.run

    def run_with_gpu(thread: threading.Thread) -> None:
        with _active():
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", run_with_gpu)
    state = torch.get_rng_state()
    plenty = 80 * 10**9
    for name, value in {
        "is_available": True, "device_count": 1, "_lazy_init": None, "current_device": 0, "synchronize": None,
        "empty_cache": None, "get_device_name": "none", "mem_get_info": (plenty, plenty), "memory_reserved": 0,
        "memory_allocated": 0, "max_memory_allocated": 0, "get_rng_state": state, "set_rng_state": None,
        "manual_seed_all": None, "get_per_process_memory_fraction": 1.0, "get_device_capability": (9, 0),
        "is_current_stream_capturing": False,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    fake_graphs(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda *_: generator())
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        with _active():
            yield GPU
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
