"""AdamW over slots: settings per member, one set of tensor operations for all members.

A setting becomes a vector with one value per slot, broadcast over the stacked parameters. Parameters of one shape are
stacked once more, so that the number of operations depends neither on the members nor on the layers. A slot that does
not step has rates of zero, which keep its weights and moments bit for bit. A zero gradient on zero weights keeps them
too, so a rank below the bank's stays padded with zeros.

Per slot it equals torch.optim.AdamW with PEFT's LoRA+ groups, as `methods/lora.py` builds them for a dedicated run.

Shapes: K slots, G parameters of one shape.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rankloom.banks.bank import AdapterBank
from rankloom.config.trial import OptimConfig

Role = Literal["a", "b", "m"]
"""A, B and DoRA's magnitude. LoRA+ gives the last two the higher rate."""
CHUNK = 2**20
"""Most elements of a stack on a CPU: larger stacks would leave the CPU's cache between two operations."""
CLIP_EPSILON = 1e-6
"""Equal to the one in torch.nn.utils.clip_grad_norm_."""


@dataclass(frozen=True)
class SlotParameter:
    """One stacked parameter, [K, ...]."""

    name: str
    role: Role
    parameter: nn.Parameter

    def trim(self, of_slot: Tensor, rank: int) -> Tensor:
        """Return a slot's values without the padding of its rank."""
        if self.role == "m":
            return of_slot
        return of_slot[:rank] if self.role == "a" else of_slot[:, :rank]


@dataclass
class _Group:
    """Parameters of one role and shape, stacked into one tensor; the parameters are views into it."""

    members: list[int]
    """Indices of the parameters."""
    role: Role
    data: Tensor
    """[G, K, ...], as are the moments `first` and `second`."""
    first: Tensor
    second: Tensor


def parameters_of(bank: AdapterBank) -> list[SlotParameter]:
    """Return a bank's trainable parameters, site by site."""
    found = []
    for name, site in bank.sites.items():
        found += [SlotParameter(f"{name}.a", "a", site.a_KRI), SlotParameter(f"{name}.b", "b", site.b_KOR)]
        if site.m_KO is not None:
            found.append(SlotParameter(f"{name}.m", "m", site.m_KO))
    return found


class SlotAdamW:
    """AdamW with settings, moments and step counts per slot.

    Args:
        parameters: the trainable parameters; their storage moves into stacks, so keep no other reference to it.
    """

    def __init__(self, parameters: Sequence[SlotParameter], num_slots: int) -> None:
        self.parameters = list(parameters)
        self.num_slots = num_slots
        self.settings: dict[int, OptimConfig] = {}
        self.counts = [0] * num_slots
        self.device = self.parameters[0].parameter.device
        self._groups = [self._group(members) for members in self._alike()]
        self._at = {i: (group, g) for group in self._groups for g, i in enumerate(group.members)}

    def assign(self, slot: int, optim: OptimConfig) -> None:
        """Start a slot with new settings, zero moments and step count 0."""
        self.clear(slot)
        self.settings[slot] = optim

    def clear(self, slot: int) -> None:
        """Forget a slot's settings and moments, in place."""
        self.settings.pop(slot, None)
        self.counts[slot] = 0
        for group in self._groups:
            group.first[:, slot].zero_()
            group.second[:, slot].zero_()

    def gather(self, gradients: list[Tensor | None]) -> list[Tensor]:
        """Stack gradients that are in the order of `parameters`, into [G, K, ...] per group.

        The list's items become None meanwhile: a second copy of all gradients would be the step's peak of memory.
        """
        stacks = []
        for group in self._groups:
            stacks.append(
                torch.stack([self._or_zero(gradients[i], self.parameters[i].parameter) for i in group.members])
            )
            for i in group.members:
                gradients[i] = None
        return stacks

    def norms(self, stacks: Sequence[Tensor]) -> Tensor:
        """Return [K], the norm of each slot's whole gradient."""
        squares = [torch.linalg.vector_norm(stack.flatten(2), dim=2).square().sum(0) for stack in stacks]
        return torch.stack(squares).sum(0).sqrt()

    def step(self, stacks: Sequence[Tensor], norms: Sequence[float], factors: Mapping[int, float]) -> None:
        """Clip and step some slots.

        Args:
            stacks: from `gather`; not changed. They must be finite, in slots that do not step too.
            norms: each slot's norm, from `norms`.
            factors: slot -> its schedule's factor on the learning rate; the other slots keep their state.
        """
        if not factors:
            return
        for slot in factors:
            self.counts[slot] += 1
        used = max(factors) + 1  # the lowest slots are taken first, so those behind are idle
        vectors = {role: self._vectors(role, used, norms, factors) for role in ("a", "b", "m")}
        for group, gradient in zip(self._groups, stacks, strict=True):
            shape = (used, *[1] * (group.data.dim() - 2))
            clip, lean_1, lean_2, correction, eps, size, keep = (v.view(shape) for v in vectors[group.role])
            first, second, data = group.first[:, :used], group.second[:, :used], group.data[:, :used]
            clipped = gradient[:, :used] * clip
            first.lerp_(clipped, lean_1)
            second.lerp_(clipped.square_(), lean_2)
            update = torch.sqrt(second, out=clipped).mul_(correction).add_(eps)  # in place: fresh pages are slow
            torch.div(first, update, out=update)
            data.mul_(keep).sub_(update.mul_(size))

    def state(self, slot: int, rank: int) -> dict[str, Tensor]:
        """Return a slot's moments and step count on the CPU, without the padding of its rank."""
        found = {"count": torch.tensor(self.counts[slot])}
        for i, item in enumerate(self.parameters):
            group, g = self._at[i]
            for kind, moment in (("first", group.first), ("second", group.second)):
                found[f"{kind}.{item.name}"] = item.trim(moment[g, slot], rank).cpu().clone()
        return found

    def load_state(self, slot: int, rank: int, state: Mapping[str, Tensor]) -> None:
        """Set a slot's moments and step count from what `state` returned."""
        self.counts[slot] = int(state["count"])
        for i, item in enumerate(self.parameters):
            group, g = self._at[i]
            for kind, moment in (("first", group.first), ("second", group.second)):
                moment[g, slot].zero_()
                item.trim(moment[g, slot], rank).copy_(state[f"{kind}.{item.name}"])

    def copy(self, source: int, target: int) -> None:
        """Copy moments and step count from one slot to another, which keeps its settings."""
        self.counts[target] = self.counts[source]
        for group in self._groups:
            group.first[:, target] = group.first[:, source]
            group.second[:, target] = group.second[:, source]

    def _vectors(self, role: Role, used: int, norms: Sequence[float], factors: Mapping[int, float]) -> Tensor:
        """Return [7, used]: clip factor, 1 - beta_1, 1 - beta_2, second moment's correction, eps, step size, decay."""
        idle = (1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0)
        columns = [idle] * used
        for slot, factor in factors.items():
            optim, count = self.settings[slot], self.counts[slot]
            (beta_1, beta_2), rate = optim.betas, factor * optim.learning_rate
            if role != "a":
                rate *= optim.loraplus_ratio
            clip = 1.0 if optim.clip_norm is None else min(1.0, optim.clip_norm / (norms[slot] + CLIP_EPSILON))
            columns[slot] = (
                clip,
                1 - beta_1,
                1 - beta_2,
                1 / math.sqrt(1 - beta_2**count),
                optim.eps,
                rate / (1 - beta_1**count),
                1 - rate * optim.weight_decay,
            )
        return torch.tensor(columns, dtype=torch.float32).T.contiguous().to(self.device, non_blocking=True)

    def _alike(self) -> list[list[int]]:
        """Return the indices of parameters that are stacked together: of one role and shape."""
        found: dict[tuple[Role, torch.Size], list[int]] = defaultdict(list)
        for i, item in enumerate(self.parameters):
            found[item.role, item.parameter.shape].append(i)
        groups = []
        for members in found.values():
            elements = self.parameters[members[0]].parameter.numel()
            most = max(1, CHUNK // elements) if self.device.type == "cpu" else len(members)
            groups += [members[i : i + most] for i in range(0, len(members), most)]
        return groups

    def _group(self, members: list[int]) -> _Group:
        parameters = [self.parameters[i].parameter for i in members]
        data = torch.stack([p.detach() for p in parameters])
        for g, parameter in enumerate(parameters):
            parameter.data = data[g]
        return _Group(members, self.parameters[members[0]].role, data, torch.zeros_like(data), torch.zeros_like(data))

    def _or_zero(self, gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(parameter) if gradient is None else gradient
