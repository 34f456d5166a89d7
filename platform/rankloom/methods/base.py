"""The interface of a fine-tuning method: which parameters train, how they are stepped and what is exported.

A method is one file. It gets a `Base` and returns the module to train; the loop calls its hooks around each optimiser
step and never asks which method it is. Read `lora.py` for the smallest one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

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
    """One method of one trial. Call `attach` first; `model` below is always the module that it returned.

    Invariant: training changes only the weights of `get_trained(model)`, its own state and the optimiser's, so that
    these three restore a run.
    """

    trains_base: bool = False
    """Whether the base's own weights change (so they are kept in fp32)."""

    def __init__(self, config: ConfigT, *, seed: int, num_steps: int) -> None:
        self.config = config
        self.seed = seed
        self.num_steps = num_steps
        self.notes: list[str] = []
        """Notes for the user on parts that `attach` leaves out."""

    @abstractmethod
    def attach(self, base: Base) -> nn.Module:
        """Return the module to train, with new parameters added and everything else frozen."""

    @abstractmethod
    def export(self, model: nn.Module, base: Base, folder: Path) -> float | None:
        """Write a PEFT folder; return the share of the update's energy that it keeps, or None if it keeps all."""

    def get_trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that a checkpoint stores, by name."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def build_optimizer(self, model: nn.Module, optim: OptimConfig) -> Optimizer:
        """Return AdamW over the trained parameters, with weight decay on matrices only."""
        return AdamW(split_decay_groups(self.get_trained(model).values(), optim), **make_adam_settings(optim))

    def before_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> bool:
        """Prepare step `step` (from 0); return True if the set of trainable parameters changed."""
        return False

    def compute_penalty(self, model: nn.Module) -> torch.Tensor | None:
        """Return a term to add to each step's loss, if any."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Finish optimiser step `step` (from 0), while the gradients still exist."""

    def get_state(self) -> State:
        """Return the method's own state: tensors and plain data that a weights-only load accepts."""
        return {}

    def load_state(self, state: State) -> None:
        """Restore the result of `get_state`."""

    def get_optimizer_state(self, optimizer: Optimizer) -> State:
        """Return the optimiser's state as tensors and plain data."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: Optimizer, state: State) -> None:
        """Restore the result of `get_optimizer_state`."""
        optimizer.load_state_dict(state)


class AdamSettings(TypedDict):
    """AdamW's keyword arguments."""

    lr: float
    betas: tuple[float, float]
    eps: float


def make_adam_settings(optim: OptimConfig) -> AdamSettings:
    """Return AdamW's keyword arguments by a trial's settings."""
    return {"lr": optim.learning_rate, "betas": optim.betas, "eps": optim.eps}


def split_decay_groups(parameters: Any, optim: OptimConfig) -> list[dict[str, Any]]:
    """Split parameters into two groups: matrices with weight decay, vectors without."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def list_peft_targets(base: Base, config: AdapterConfig) -> list[str]:
    """Return the target linears for PEFT: last names (`q_proj`) if these match no other layer, else full names."""
    full = find_target_linears(base.model, config.target_modules)
    short = sorted({name.rsplit(".", 1)[-1] for name in full})
    matched = [n for n, _ in base.model.named_modules() if n.rsplit(".", 1)[-1] in short]
    return short if sorted(matched) == sorted(full) else full


def list_peft_parameters(base: Base) -> list[str]:
    """Return the experts for PEFT: last names (`experts.down_proj`) if these match no others, else full names."""
    full = list(find_experts(base.model))
    short = sorted({".".join(name.split(".")[-2:]) for name in full})
    matched = [name for name, _ in base.model.named_parameters() if name.endswith(tuple(f".{each}" for each in short))]
    return short if sorted(matched) == sorted(full) else full


def has_conv1d(base: Base) -> bool:
    """Return whether there are GPT-2's linear layers, whose weights are transposed: PEFT needs a setting for them."""
    return any(isinstance(module, Conv1D) for module in base.model.modules())
