"""AdamW over slots: settings per member, one set of tensor operations for all members.

A setting becomes a vector with one value per slot, broadcast over the stacked parameters. Parameters of one shape are
stacked once more, so that the number of operations depends neither on the members nor on the layers. A slot that does
not step keeps its weights and moments bit for bit, and so does one whose loss or gradient is not finite. A zero
gradient on zero weights keeps them too, so a rank below the bank's stays padded with zeros.

Norms, clipping and the check are tensors: nothing waits for the device. Per slot it equals torch.optim.AdamW with
PEFT's LoRA+ groups, as `methods/lora.py` builds them for a dedicated run.

Shapes: K slots, G parameters of one shape, S settings of a slot (`kernels.adamw`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from rankloom.banks.bank import AdapterBank
from rankloom.config.trial import OptimConfig
from rankloom.kernels.adamw import IDLE, slot_adamw, slot_squares
from rankloom.models.staging import download

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
    shadow: Tensor | None = None
    """A copy in another dtype, which follows the parameter."""

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
    """[G, K, ...], as are the moments `first` and `second`, and the shadows."""
    first: Tensor
    second: Tensor
    shadow: Tensor | None

    @property
    def rank_axis(self) -> tuple[int, int]:
        """The size of the rank's axis, and of what lies within it."""
        if self.role == "m":
            return 1, 1
        return (self.data.shape[2], self.data.shape[3]) if self.role == "a" else (self.data.shape[3], 1)


def list_parameters(bank: AdapterBank) -> list[SlotParameter]:
    """Return a bank's trainable parameters, site by site."""
    found = []
    for name, site in bank.sites.items():
        a_KRI, b_KOR = (None, None) if site.slots is None else (site.slots.a_KRI, site.slots.b_KOR)
        found += [
            SlotParameter(f"{name}.a", "a", site.a_KRI, a_KRI),
            SlotParameter(f"{name}.b", "b", site.b_KOR, b_KOR),
        ]
        if site.m_KO is not None:
            found.append(SlotParameter(f"{name}.m", "m", site.m_KO))
    return found


class SlotAdamW:
    """AdamW with settings, moments and step counts per slot.

    Args:
        parameters: the trainable parameters; their storage, and that of their shadows, moves into stacks, so keep no
            other reference to it.
    """

    def __init__(self, parameters: Sequence[SlotParameter], num_slots: int) -> None:
        self.parameters = list(parameters)
        self.num_slots = num_slots
        self.settings: dict[int, OptimConfig] = {}
        self.counts, self.ranks = [0] * num_slots, [0] * num_slots
        self.device = self.parameters[0].parameter.device
        self._idle_S1 = torch.tensor(IDLE, device=self.device)[:, None]
        self._groups = [self._group(members) for members in self._group_alike()]
        self._at = {i: (group, g) for group in self._groups for g, i in enumerate(group.members)}

    def assign(self, slot: int, optim: OptimConfig, rank: int) -> None:
        """Start a slot with new settings, zero moments and step count 0."""
        self.clear(slot)
        self.settings[slot], self.ranks[slot] = optim, rank

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
                torch.stack([self._fill_zero(gradients[i], self.parameters[i].parameter) for i in group.members])
            )
            for i in group.members:
                gradients[i] = None
        return stacks

    def compute_norms(self, stacks: Sequence[Tensor]) -> Tensor:
        """Return [K], the norm of each slot's whole gradient."""
        return torch.stack([slot_squares(stack) for stack in stacks]).sum(0).sqrt()

    def step(self, stacks: Sequence[Tensor], losses_K: Tensor, factors: Mapping[int, float]) -> Tensor:
        """Clip and step some slots; return [K], the norm of each slot's gradient.

        Args:
            stacks: from `gather`; not changed.
            losses_K: each slot's loss. A slot whose loss or gradient is not finite keeps its state.
            factors: slot -> its schedule's factor on the learning rate; the other slots keep their state.
        """
        norms_K = self.compute_norms(stacks)
        if factors:
            settings_2SK = torch.from_numpy(self.make_settings(factors)).to(self.device, non_blocking=True)
            self.apply(stacks, settings_2SK, losses_K, norms_K, used=max(factors) + 1)
            self.count(factors)
        return norms_K

    def count(self, slots: Iterable[int]) -> None:
        """Count a step of some slots."""
        for slot in slots:
            self.counts[slot] += 1

    def make_settings(self, factors: Mapping[int, float]) -> np.ndarray:
        """Return [2, S, K], the slots' settings for their next step: of A, and of the other roles."""
        columns = [[IDLE] * self.num_slots for _ in range(2)]
        for slot, factor in factors.items():
            optim, count = self.settings[slot], self.counts[slot] + 1
            beta_1, beta_2 = optim.betas
            for r, ratio in enumerate((1.0, optim.loraplus_ratio)):
                rate = factor * optim.learning_rate * ratio
                columns[r][slot] = (
                    math.inf if optim.clip_norm is None else optim.clip_norm,
                    1 - beta_1,
                    1 - beta_2,
                    1 / math.sqrt(1 - beta_2**count),
                    optim.eps,
                    rate / (1 - beta_1**count),
                    1 - rate * optim.weight_decay,
                    self.ranks[slot],
                )
        return np.ascontiguousarray(np.array(columns, dtype=np.float32).transpose(0, 2, 1))

    def apply(
        self, stacks: Sequence[Tensor], settings_2SK: Tensor, losses_K: Tensor, norms_K: Tensor, *, used: int
    ) -> None:
        """Apply a step whose settings are on the device.

        Args:
            used: number of slots to look at; those behind are idle.
        """
        settings_2SK = settings_2SK.clone()
        settings_2SK[:, 0].div_(norms_K + CLIP_EPSILON).clamp_(max=1)
        is_finite_K = (losses_K + norms_K) * 0 == 0
        settings_2SK = torch.where(is_finite_K, settings_2SK, self._idle_S1)
        for group, gradient in zip(self._groups, stacks, strict=True):
            data, first, second = (t[:, :used] for t in (group.data, group.first, group.second))
            shadow = None if group.shadow is None else group.shadow[:, :used]
            settings_SK = settings_2SK[int(group.role != "a"), :, :used]
            num_ranks, inner = group.rank_axis
            slot_adamw(data, first, second, gradient[:, :used], settings_SK, shadow, num_ranks, inner)

    def download_slot(self, slot: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return a slot's values and its two moments on the CPU, by the parameter's name, with their padding."""
        stacks = [stack for group in self._groups for stack in (group.data, group.first, group.second)]
        copies = iter(download([stack[:, slot] for stack in stacks]))
        of_group = {id(group): (next(copies), next(copies), next(copies)) for group in self._groups}
        found = {}
        for i, item in enumerate(self.parameters):
            group, g = self._at[i]
            data, first, second = of_group[id(group)]
            found[item.name] = data[g], first[g], second[g]
        return found

    def get_state(
        self, slot: int, rank: int, copy: Mapping[str, tuple[Tensor, Tensor, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """Return a slot's moments and step count on the CPU, without the padding of its rank.

        Args:
            copy: from `download_slot`, where there is one.
        """
        copy = self.download_slot(slot) if copy is None else copy
        found = {"count": torch.tensor(self.counts[slot])}
        for item in self.parameters:
            for kind, moment in zip(("first", "second"), copy[item.name][1:], strict=True):
                found[f"{kind}.{item.name}"] = item.trim(moment, rank).clone()
        return found

    def load_state(self, slot: int, rank: int, state: Mapping[str, Tensor]) -> None:
        """Set a slot's moments and step count from what `get_state` returned."""
        self.counts[slot] = int(state["count"])
        for group in self._groups:
            for kind, stack in (("first", group.first), ("second", group.second)):
                moments = torch.zeros(stack[:, slot].shape)  # on the CPU, so that one copy brings all to the device
                for moment, i in zip(moments, group.members, strict=True):
                    item = self.parameters[i]
                    item.trim(moment, rank).copy_(state[f"{kind}.{item.name}"])
                stack[:, slot] = moments.to(self.device)

    def copy(self, source: int, target: int) -> None:
        """Copy moments and step count from one slot to another, which keeps its settings."""
        self.counts[target] = self.counts[source]
        for group in self._groups:
            group.first[:, target] = group.first[:, source]
            group.second[:, target] = group.second[:, source]

    def _group_alike(self) -> list[list[int]]:
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
        own = [self.parameters[i] for i in members]
        data = _move_into_stack([item.parameter for item in own])
        shadows = [item.shadow for item in own if item.shadow is not None]
        shadow = _move_into_stack(shadows) if shadows else None
        return _Group(members, own[0].role, data, torch.zeros_like(data), torch.zeros_like(data), shadow)

    def _fill_zero(self, gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(parameter) if gradient is None else gradient


def _move_into_stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return a stack of the tensors, which become views of it."""
    stack = torch.stack([tensor.detach() for tensor in tensors])
    for g, tensor in enumerate(tensors):
        tensor.data = stack[g]
    return stack
