"""DeviceStep: the device's part of a host's steps: gradients, summed up over micro-batches, and AdamW.

A plan is computed in parts (`add`, once or more, then `apply`), or where the base and its bank allow it, in one go
(`add_and_apply`): then a step is one function of tensors, from the forward to AdamW, which a CUDA graph holds. Its
sizes are rounded up; what is in a slot, and its settings in this step, are tensors, so members join and leave without a
new graph.

Shapes: G parameters of one shape, K slots, M predicted tokens, S settings of a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rankloom.kernels.graphs import GraphCache
from rankloom.models.device import free_cuda_bytes
from rankloom.models.staging import count_bytes, upload
from rankloom.training.fused.forward import FusedForward
from rankloom.training.fused.optim import SlotAdamW
from rankloom.training.fused.packing import Arranged
from rankloom.training.fused.plan import MOST_RECORDED


class DeviceStep:
    """Sums of gradients [G, K, ...] and losses [K] of the members' current steps."""

    def __init__(self, forward: FusedForward, optimizer: SlotAdamW) -> None:
        self.forward, self.optimizer = forward, optimizer
        self.graphs = GraphCache(forward.base.device)
        self.is_empty = True
        """Whether no step has a part of its gradient."""
        self._stacks: list[Tensor] | None = None
        self._losses_K = torch.zeros(optimizer.num_slots, device=optimizer.device)
        self._buffer: Tensor | None = None
        """The arrays of a step in one go, at an address that graphs know."""

    def add(self, arranged: Arranged, dropout_seeds: dict[int, int]) -> None:
        """Add rows' gradients and losses to the sums."""
        tensors = upload(arranged.arrays, self.optimizer.device)
        stacks, losses_K = self._compute_gradients(arranged, tensors, dropout_seeds)
        self._losses_K += losses_K
        if self._stacks is None:
            self._stacks = stacks
        else:
            _add(self._stacks, stacks)
        self.is_empty = False

    def apply(self, factors: Mapping[int, float]) -> tuple[list[float], list[float]]:
        """Step slots whose sums are complete; return the sum of each slot's losses, and its gradient's norm.

        Args:
            factors: slot -> its schedule's factor on the learning rate.
        """
        assert self._stacks is not None
        norms_K = self.optimizer.step(self._stacks, self._losses_K, factors)
        losses, norms = torch.stack([self._losses_K, norms_K]).tolist()  # the step's one wait for the device
        return losses, norms

    def add_and_apply(
        self, arranged: Arranged, factors: Mapping[int, float], *, partial: bool, meanwhile: Callable[[], None]
    ) -> tuple[list[float], list[float]]:
        """Add rows and step the slots that these complete, in one go; `arranged` has rows as they lie, `is_one_go`.

        Args:
            partial: whether there are sums before, or will be after.
            meanwhile: is called while the device computes.

        Returns:
            As `apply`. The sums of the slots that stepped are zero.

        Raises:
            torch.OutOfMemoryError: nothing has changed, but the graphs are gone.
        """
        arranged = arranged.round_sizes(self.optimizer.num_slots)
        arrays = arranged.arrays | {"settings_2SK": self.optimizer.make_settings(factors)}
        if partial and self._stacks is None:
            self._stacks = self.optimizer.gather([None] * len(self.optimizer.parameters))
        tensors = upload(arrays, self.optimizer.device, into=self._make_room(arrays))
        shapes = tuple(array.shape for array in arrays.values())
        key = (shapes, arranged.longest, partial, self.forward.describe_sites())
        try:
            if key in self.graphs or self._may_record(arranged.num_tokens):
                result_2K = self.graphs.run(key, lambda: self._compute_whole(arranged, tensors, partial))
            else:
                result_2K = self._compute_whole(arranged, tensors, partial)
        except torch.OutOfMemoryError:
            self.graphs.clear()
            raise
        meanwhile()
        losses, norms = result_2K.tolist()  # the step's one wait for the device
        self.optimizer.count(factors)
        self.is_empty = not partial
        return losses, norms

    def clear(self, slots: Sequence[int]) -> None:
        """Forget the sums of some slots."""
        for slot in slots:
            self._losses_K[slot].zero_()
            for stack in self._stacks or ():
                stack[:, slot].zero_()

    def drop(self) -> None:
        """Forget all sums; memory that no graph knows is freed."""
        if self.is_empty:
            return
        self.is_empty = True
        self._losses_K.zero_()
        if self.graphs.num_recorded:
            for stack in self._stacks or ():
                stack.zero_()
        else:
            self._stacks = None

    def _may_record(self, num_tokens: int) -> bool:
        """Return whether a graph gains time, and its memory leaves enough for a step without one, or an evaluation."""
        device = self.optimizer.device
        if num_tokens > MOST_RECORDED or device.type != "cuda":
            return num_tokens <= MOST_RECORDED
        most = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        return free_cuda_bytes(device) >= 2 * most

    def _compute_whole(self, arranged: Arranged, tensors: Mapping[str, Tensor], partial: bool) -> Tensor:
        """Return [2, K], losses and norms; nothing in here waits for the device, or comes from the host's memory."""
        stacks, losses_K = self._compute_gradients(arranged, tensors, {})
        if partial:
            assert self._stacks is not None
            _add(self._stacks, stacks)
            stacks, losses_K = self._stacks, self._losses_K.add_(losses_K)
        norms_K, settings_2SK = self.optimizer.compute_norms(stacks), tensors["settings_2SK"]
        self.optimizer.apply(stacks, settings_2SK, losses_K, norms_K, used=self.optimizer.num_slots)
        result_2K = torch.stack([losses_K, norms_K])
        if partial:
            stepped_K = settings_2SK[0, 0] != 0
            losses_K.masked_fill_(stepped_K, 0)
            for stack in stacks:
                stack.masked_fill_(stepped_K.view(-1, *[1] * (stack.dim() - 2)), 0)
        return result_2K

    def _compute_gradients(
        self, arranged: Arranged, tensors: Mapping[str, Tensor], dropout_seeds: dict[int, int]
    ) -> tuple[list[Tensor], Tensor]:
        """Return the gradients of the sum of the members' mean losses, as stacks, and [K], the sums of their losses."""
        with self.forward.apply_route(arranged, tensors, dropout_seeds) as packed:
            losses_M = self.forward.compute_losses(packed) * packed.weights_M
            # one sum more, of predictions that are nobody's
            sums_K = losses_M.new_zeros(self.optimizer.num_slots + 1).index_add(0, tensors["slots_M"], losses_M)[:-1]
            loss = (sums_K * tensors["shares_K"]).sum()
            # not .backward(): if memory runs out half-way, no gradient has been accumulated yet
            found: list[Tensor | None] = [
                *torch.autograd.grad(loss, [p.parameter for p in self.optimizer.parameters], allow_unused=True)
            ]
        return self.optimizer.gather(found), sums_K.detach()

    def _make_room(self, arrays: Mapping[str, np.ndarray]) -> Tensor:
        size = count_bytes(arrays.values())
        if self._buffer is None or len(self._buffer) < size:
            self.graphs.clear()  # they know the old address
            self._buffer = torch.empty(2 * size, dtype=torch.uint8, device=self.optimizer.device)
        return self._buffer[:size]


def _add(stacks: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for mine, new in zip(stacks, others, strict=True):
        mine.add_(new)
