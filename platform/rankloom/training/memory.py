"""Memory of a process on its device: its peak, what is free, and the `Shape` of a loaded model for `memory_plan.py`."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from rankloom import kernels
from rankloom.config.method import Targets
from rankloom.models import Base, find_decoder_layers, find_experts, find_target_linears, get_linear_widths
from rankloom.models.device import free_cuda_bytes
from rankloom.training.memory_plan import Shape

if TYPE_CHECKING:
    from rankloom.data import TaskData

WRITTEN_OUT = {"gelu_new", "gelu_fast", "quick_gelu", "gelu_accurate"}
"""Activation functions that transformers computes in several steps; the backward pass keeps each step's result."""
ACTIVATIONS, ACTIVATIONS_WRITTEN_OUT, ACTIVATIONS_FUSED = 1.2, 2.0, 0.88
"""Measured; see `memory_plan.Shape.activations`. Fused: what the fast path keeps for the backward pass."""
LAYERS_PASSING = 2
"""Layers whose activations are as large as what a layer's backward pass allocates for itself."""
MEMORY_INFO, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def read_peak_memory_bytes(device: torch.device) -> int:
    """Return the peak: on CUDA of torch's allocations, on a CPU of the process's resident set, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_free_bytes(device: torch.device) -> float | None:
    """Return the bytes that can still be allocated; None where the CPU's system does not report them."""
    if device.type == "cuda":
        return free_cuda_bytes(device)
    if not MEMORY_INFO.is_file():
        return None
    fields = dict(line.split(":") for line in MEMORY_INFO.read_text().splitlines())
    free = 1024.0 * int(fields["MemAvailable"].split()[0])
    limit = GROUP / "memory.max"
    if limit.is_file() and (most := limit.read_text().strip()) != "max":  # the limit of a container
        used = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        free = min(free, float(most) - float(used["anon"]) - float(used["shmem"]))  # the rest is cache
    return free


def read_shape(
    base: Base,
    data: TaskData,
    targets: Targets = "all-linear",
    *,
    experts: bool = False,
    dtype: torch.dtype | None = None,
) -> Shape:
    """Return the shape of a loaded base for `memory_plan.py`.

    Args:
        targets: the linear layers that adapters are on.
        experts: whether adapters are on experts too.
        dtype: type of the arithmetic, where it differs from the weights'; None: theirs.
    """
    train = data.report.splits["train"]
    return describe_model(
        base.model,
        targets,
        experts=experts,
        predicted_share=train.trained_tokens / train.tokens,
        quantization=base.quantization,
        dtype=dtype or base.model.get_input_embeddings().weight.dtype,
        device=base.device,
    )


def describe_model(
    model: PreTrainedModel,
    targets: Targets,
    *,
    experts: bool,
    predicted_share: float,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Shape:
    """Return the shape of a model, which may be without weights on the meta device.

    Args:
        predicted_share: share of the data's tokens that carry loss.
        quantization: how its linear layers are, or will be, quantised.
        dtype: type of its other weights; for a method that trains them, of the arithmetic.
        device: where it computes, or will.
    """
    modules, config = dict(model.named_modules()), model.config.get_text_config()
    linears = {name: get_linear_widths(modules[name]) for name in find_target_linears(model, "all-linear")}
    weights = {id(modules[name].weight) for name in linears}
    fast = kernels.use_on(device) and dtype in kernels.FAST_DTYPES
    num_layers, stacks = len(find_decoder_layers(model)), tuple(find_experts(model).values())
    act = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    kept = ACTIVATIONS_WRITTEN_OUT if act in WRITTEN_OUT else ACTIVATIONS_FUSED
    head = model.get_output_embeddings()
    return Shape(
        linears=tuple(linears.values()),
        targets=tuple(linears[name] for name in find_target_linears(model, targets)),
        num_layers=num_layers,
        num_other=sum(p.numel() for p in model.parameters() if id(p) not in weights),
        vocabulary=model.get_input_embeddings().weight.shape[0],
        activations=ACTIVATIONS_WRITTEN_OUT if act in WRITTEN_OUT else ACTIVATIONS,
        predicted_share=predicted_share,
        quantization=quantization,
        value_bytes=dtype.itemsize,
        padded=device.type != "cpu" and not fast,
        fast=kept * (1 + LAYERS_PASSING / num_layers) if fast else None,
        recorded=fast and device.type == "cuda",
        experts=tuple((len(p), p.shape[1], p.shape[2]) for p in stacks) if experts else (),
        num_stacked=sum(p.numel() for p in stacks),
        routed=(getattr(config, "num_experts_per_tok", None) or 0) * sum(p.shape[1] + p.shape[2] for p in stacks),
        num_head=head.weight.numel() if head is not None else 0,
    )
