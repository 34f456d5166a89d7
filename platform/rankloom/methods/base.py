"""What a fine-tuning method is: a small object that says what trains, how it is stepped and what it leaves behind.

A method is one file. It sees a `Base` and returns the module to train; the loop calls its hooks around each
optimiser step and never asks which method it is. Read `lora.py` for the smallest one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers.pytorch_utils import Conv1D

from rankloom.config.method import AdapterConfig, FullRankConfig
from rankloom.config.trial import OptimConfig
from rankloom.models import Base, find_experts, find_target_linears

ConfigT = TypeVar("ConfigT", bound=AdapterConfig | FullRankConfig)
State = dict[str, Any]


class Method(ABC, Generic[ConfigT]):
    """One method of one trial. `attach` comes first; `model` below is always the module that it returned.

    Invariant: the weights named by `trained(model)`, with `state` and the optimiser's state, are all that changes
    while it trains, so that these three restore a run.
    """

    trains_base: bool = False
    """Whether the base's own weights change (so they are kept in fp32)."""

    def __init__(self, config: ConfigT, *, seed: int, num_steps: int) -> None:
        self.config = config
        self.seed = seed
        self.num_steps = num_steps
        self.notes: list[str] = []
        """What `attach` leaves out and the user should know of."""

    @abstractmethod
    def attach(self, base: Base) -> nn.Module:
        """Make trainable what trains, adding it where it is not there yet."""

    @abstractmethod
    def export(self, model: nn.Module, base: Base, folder: Path) -> float | None:
        """Write a PEFT folder; the share of the update's energy that it keeps, None where it keeps all of it."""

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What a checkpoint holds of the model, by name."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def build_optimizer(self, model: nn.Module, optim: OptimConfig) -> Optimizer:
        """AdamW over what trains; weight decay on matrices only."""
        return AdamW(decay_groups(self.trained(model).values(), optim), **adam_settings(optim))

    def before_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> bool:
        """Called before step `step` (from 0); True if the set of trainable parameters changed."""
        return False

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """A term added to each step's loss."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after optimiser step `step` (from 0), while the gradients are still there."""

    def state(self) -> State:
        """What the method itself must remember: tensors and plain data that a weights-only load accepts."""
        return {}

    def load_state(self, state: State) -> None:
        """The inverse of `state`."""

    def optimizer_state(self, optimizer: Optimizer) -> State:
        """The optimiser's state as tensors and plain data."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: Optimizer, state: State) -> None:
        """The inverse of `optimizer_state`."""
        optimizer.load_state_dict(state)


def adam_settings(optim: OptimConfig) -> dict[str, Any]:
    return {"lr": optim.learning_rate, "betas": optim.betas, "eps": optim.eps}


def decay_groups(parameters: Any, optim: OptimConfig) -> list[dict[str, Any]]:
    """Two parameter groups: matrices with weight decay, vectors without."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def peft_targets(base: Base, config: AdapterConfig) -> list[str]:
    """The target linears in PEFT's spelling: last names (`q_proj`) where these mean the same, else full names."""
    full = find_target_linears(base.model, config.target_modules)
    short = sorted({name.rsplit(".", 1)[-1] for name in full})
    matched = [n for n, _ in base.model.named_modules() if n.rsplit(".", 1)[-1] in short]
    return short if sorted(matched) == sorted(full) else full


def peft_parameters(base: Base) -> list[str]:
    """The experts in PEFT's spelling: last names (`experts.down_proj`) where these mean the same, else full names."""
    full = list(find_experts(base.model))
    short = sorted({".".join(name.split(".")[-2:]) for name in full})
    matched = [name for name, _ in base.model.named_parameters() if name.endswith(tuple(f".{each}" for each in short))]
    return short if sorted(matched) == sorted(full) else full


def has_conv1d(base: Base) -> bool:
    """GPT-2's linear layers keep their weights transposed; PEFT wants to be told."""
    return any(isinstance(module, Conv1D) for module in base.model.modules())
