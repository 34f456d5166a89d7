"""What a method costs by itself, measured: its memory by part, and its speed.

In a comparison some methods share a host and others run beside each other, so that neither the peak of a process nor
the time of a step is a method's own. `measure_cost` trains each method alone for a few steps, on the rows and with the
settings of its trial. Bytes are of tensors: on CUDA the allocator counts them, on a CPU torch's profiler.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from rankloom.config import TrialConfig
from rankloom.data import find_longest_batch, load_data
from rankloom.errors import TrialError
from rankloom.evals.costs import count_weight_bytes
from rankloom.evals.own_metric import MetricFunction
from rankloom.events import Event, StepFinished
from rankloom.methods import get_method_class
from rankloom.models import load_tokenizer
from rankloom.models.device import choose_device
from rankloom.registry.scorecard import MethodCost
from rankloom.training.loop import TrainingLoop
from rankloom.training.precision import choose_precision, load_trial_base
from rankloom.training.session import LocalSession

TIMED_STEPS = 4


def measure_cost(trial: TrialConfig, metric: MetricFunction | None = None) -> MethodCost:
    """Train a trial alone for a few steps, and measure its memory and its speed.

    Args:
        metric: the function of `eval.metric`, where Python code handed it over.

    Raises:
        RankloomError: the data or the base can't be loaded, or memory does not suffice.
    """
    device = choose_device(trial.compute.device)
    data = load_data(trial.data, load_tokenizer(trial.model))
    base = load_trial_base(trial, device, in_fp32=get_method_class(trial.method).trains_base)
    speeds: list[float] = []

    def take(event: Event) -> None:
        if isinstance(event, StepFinished):
            speeds.append(event.tokens_per_s)

    with tempfile.TemporaryDirectory() as scratch:
        session = LocalSession(Path(scratch), device=device, on_event=take)
        loop = TrainingLoop(trial, base, data, session, choose_precision(trial, device), metric)
        probe = _MemoryProbe(loop)
        try:
            probe.step()  # makes the optimiser's state
            num_steps = max(1, min(TIMED_STEPS, loop.num_steps - 2))
            del speeds[:]
            for _ in range(num_steps):
                loop.step()
            timed = list(speeds)
            loop.cursor.load_state_dict(find_longest_batch(loop.cursor, loop.num_steps)[0])
            probe.step()
        except torch.OutOfMemoryError:
            raise TrialError(
                f"{trial.method.type}: its steps run out of memory on {device}; lower optim.batch_size"
            ) from None
        return MethodCost(
            trainable_parameters=loop.trainable_parameters,
            weight_bytes=count_weight_bytes(loop.module),
            gradient_bytes=probe.gradients,
            optimizer_bytes=_count_state_bytes(loop),
            activation_bytes=probe.activations,
            peak_bytes=probe.peak,
            tokens_per_s=statistics.median(timed),
            num_steps=num_steps,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}",
        )


class _MemoryProbe:
    """Takes steps of a loop and records the most bytes of gradients, saved activations and in all."""

    def __init__(self, loop: TrainingLoop) -> None:
        self._loop = loop
        self.gradients = self.activations = self.peak = 0

    def step(self) -> None:
        gc.collect()
        loop, device = self._loop, self._loop.session.device
        before = count_weight_bytes(loop.module) + _count_state_bytes(loop)
        handle = loop.optimizer.register_step_pre_hook(self._take_gradients)
        try:
            with _watch_saved_tensors(_list_storages(loop.module.parameters()), self._take_activations):
                most = measure_peak(loop.step, device)
        finally:
            handle.remove()
        self.peak = max(self.peak, most if device.type == "cuda" else before + most)

    def _take_gradients(self, optimizer: Optimizer, *_: Any) -> None:
        gradients = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        self.gradients = max(self.gradients, sum(each.numel() * each.element_size() for each in gradients))

    def _take_activations(self, size: int) -> None:
        self.activations = max(self.activations, size)


@contextmanager
def _watch_saved_tensors(excluded: set[int], take: Callable[[int], None]) -> Iterator[None]:
    """Call `take` with the bytes that autograd has saved whenever it saves a tensor; weights do not count."""
    held: set[int] = set()
    total, is_backward = 0, False

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total, is_backward
        if is_backward:  # a new forward: of the next micro-batch, or of a recomputed layer
            held.clear()
            total, is_backward = 0, False
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded and storage.data_ptr() not in held:
            held.add(storage.data_ptr())
            total += storage.nbytes()
            take(total)
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        nonlocal is_backward
        is_backward = True
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _list_storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def measure_peak(call: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that torch holds during a call: on CUDA all, on a CPU those allocated since its start."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def _count_state_bytes(loop: TrainingLoop) -> int:
    """Return the bytes of the optimiser's and the method's tensors, each counted once."""
    state = [loop.method.get_optimizer_state(loop.optimizer), loop.method.get_state()]
    storages = {
        each.data_ptr(): each.nbytes() for each in (tensor.untyped_storage() for tensor in _walk_tensors(state))
    }
    return sum(storages.values())


def _walk_tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from _walk_tensors(each)
    elif isinstance(tree, (list, tuple)):
        for each in tree:
            yield from _walk_tensors(each)
