"""N workers train one model: DDP for adapters, FSDP2 where all weights train, the plain model for a single worker.

The launcher sets up the process group (Ray Train does). A step's loss is the mean over the tokens of *all* workers, so
N workers compute the gradient that one worker would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from rankloom.errors import TrialError
from rankloom.models import find_decoder_layers, skips_layers

T = TypeVar("T")
Strategy = Literal["ddp", "fsdp"]


class Workers:
    """This worker's rank, and the collective operations of all workers."""

    def __init__(
        self, rank: int, world_size: int, device: torch.device, strategy: Strategy, precision: torch.dtype
    ) -> None:
        """
        Args:
            precision: dtype of the arithmetic; sharded weights are fp32.
        """
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.strategy = strategy
        self.precision = precision

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module to call forward and backward on; call again when trainable parameters change."""
        if self.world_size == 1:
            return model
        if self.strategy == "fsdp":
            # without a mesh, FSDP would use GPUs wherever there are any
            mesh = init_device_mesh(self.device.type, (self.world_size,))
            low = None if self.precision == torch.float32 else self.precision
            policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)  # gathers in `low`
            for layer in find_decoder_layers(model):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        base: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
        # no initial broadcast: every worker loaded the same base and drew the same adapter
        return DistributedDataParallel(
            model,
            device_ids=devices,
            forward_sync_buffers=False,
            init_sync=False,
            find_unused_parameters=skips_layers(base),
        )

    def sum(self, *values: float) -> list[float]:
        """Return each value summed over the workers."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(v) for v in tensor]

    def gather(self, dealt: Sequence[T]) -> list[T]:
        """Return the whole list on every worker.

        Args:
            dealt: this worker's items: every world_size-th item of the list, beginning at index `rank`.
        """
        if self.world_size == 1:
            return list(dealt)
        parts: list[list[T]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(parts, list(dealt))
        return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]

    def from_first(self, call: Callable[[], T]) -> T:
        """Call on rank 0 alone; every worker returns its result, or raises its TrialError."""
        if self.world_size == 1:
            return call()
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [call()]
            except TrialError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], TrialError):
            raise outcome[0]
        return cast("T", outcome[0])

    @contextmanager
    def synchronize_last(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients in the last micro-batch of a step only."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        if isinstance(model, DistributedDataParallel) and not last:
            with model.no_sync():
                yield
        else:
            yield


def reshard(model: nn.Module) -> None:
    """Shard the weights again after a forward without backward, where FSDP2 leaves the root's weights gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def clip(parameters: Iterable[nn.Parameter], max_norm: float | None) -> float | None:
    """Scale the gradients to a norm of at most `max_norm`.

    Returns:
        The norm before; None where no parameter has a gradient, as when a method steps within the backward pass.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    if not with_gradient:
        return None
    norm = torch.nn.utils.clip_grad_norm_(with_gradient, max_norm if max_norm is not None else float("inf"))
    return float(unshard(norm))


def unshard(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor gathered on every worker (all must call), and any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unshard_tree(tree: Any) -> Any:
    """Apply `unshard` to every tensor in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return unshard(tree)
    if isinstance(tree, dict):
        return {key: unshard_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(unshard_tree(value) for value in tree)
    return tree


def shard_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return `value`, sharded like `parameter`."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
