"""GaLore (Zhao et al. 2024, arXiv 2403.03507): all weights train, Adam's moments live in a low-rank projection.

The projector is galore-torch's. Its optimisers are not used: they keep the projector as a Python object in their
state, which a weights-only load refuses, and the 8-bit one calls bitsandbytes with stale arguments. `Projected` does
the same arithmetic around any optimiser (a test compares it with `galore_torch.GaLoreAdamW`) and keeps projectors
separately, as tensors. With several workers, rank 0 broadcasts its projection, so that all use one subspace.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
import torch.distributed as dist
from galore_torch.galore_projector import GaLoreProjector
from torch import nn
from torch.optim import AdamW, Optimizer

from rankloom.config.method import GaLoreConfig
from rankloom.config.trial import OptimConfig
from rankloom.methods.base import State, make_adam_settings, split_decay_groups
from rankloom.methods.full import BaseTraining
from rankloom.models import Base, find_experts, find_target_linears, list_endings


class Projector(GaLoreProjector):  # type: ignore[misc]
    """galore-torch's projector, equal on every worker."""

    def get_orthogonal_matrix(self, weights: torch.Tensor, rank: int, type: str) -> torch.Tensor:
        matrix: torch.Tensor = super().get_orthogonal_matrix(weights, rank, type).contiguous()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(matrix, src=0)
        return matrix


class Projected(Optimizer):
    """Mixin for an optimiser that steps groups with a `rank` in their projection.

    For such a group, a zero and the projected gradient, [m, r] or [r, n], replace the weight W [m, n] and its gradient;
    the optimiser's own step turns the zero into the low-rank update, which is projected back onto W.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.projectors: dict[nn.Parameter, Projector] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        weights: dict[nn.Parameter, torch.Tensor] = {}
        projected = [(g, p) for g in self.param_groups if "rank" in g for p in g["params"] if p.grad is not None]
        for group, parameter in projected:
            projector = self.projectors.setdefault(parameter, build_projector(group))
            gradient = projector.project(parameter.grad, int(self.state[parameter].get("step", 0)))
            weights[parameter] = parameter.data
            parameter.grad = None
            parameter.data = torch.zeros_like(gradient)
            parameter.grad = gradient
        super().step(closure)
        for group, parameter in projected:
            weight = weights[parameter].add_(self.projectors[parameter].project_back(parameter.data))
            parameter.grad = None
            parameter.data = weight.mul_(1 - group["lr"] * group["projected_decay"])


class ProjectedAdamW(Projected, AdamW):
    """AdamW in the projection."""


class ProjectedAdamW8bit(Projected, bitsandbytes.optim.AdamW8bit):  # type: ignore[misc]
    """bitsandbytes' AdamW in the projection, with 8-bit moments."""


def build_projector(group: dict[str, Any]) -> Projector:
    """Return a projector with a parameter group's settings."""
    return Projector(group["rank"], update_proj_gap=group["interval"], scale=group["scale"], proj_type="std")


class GaLore(BaseTraining[GaLoreConfig]):
    """Training of full-rank weights with low-rank moments."""

    def attach(self, base: Base) -> nn.Module:
        model = super().attach(base)
        modules = dict(base.model.named_modules())
        self._projected = [modules[name].weight for name in find_target_linears(base.model, "all-linear")]
        if experts := find_experts(base.model):
            self.notes.append(
                f"the experts are not linear layers and train without a projection: {list_endings(experts)}"
            )
        return model

    def build_optimizer(self, model: nn.Module, optim: OptimConfig) -> Optimizer:
        config = self.config
        projected = {id(p) for p in self._projected}
        groups = split_decay_groups((p for p in self.get_trained(model).values() if id(p) not in projected), optim)
        groups.append(
            {
                "params": self._projected,
                "rank": config.rank,
                "interval": config.interval,
                "scale": config.scale,
                "weight_decay": 0.0,  # the optimiser's own would decay the projected update
                "projected_decay": optim.weight_decay,
            }
        )
        kind = ProjectedAdamW8bit if config.optimizer == "adamw8bit" else ProjectedAdamW
        optimizer = kind(groups, **make_adam_settings(optim))
        if config.layerwise:
            for parameter in self.get_trained(model).values():
                parameter.register_post_accumulate_grad_hook(lambda p: _step_alone(optimizer, p))
        return optimizer

    def get_optimizer_state(self, optimizer: Optimizer) -> State:
        assert isinstance(optimizer, Projected)
        bases = {
            i: optimizer.projectors[p].ortho_matrix for i, p in enumerate(self._projected) if p in optimizer.projectors
        }
        return {"optimizer": optimizer.state_dict(), "projections": bases}

    def load_optimizer_state(self, optimizer: Optimizer, state: State) -> None:
        assert isinstance(optimizer, Projected)
        optimizer.load_state_dict(state["optimizer"])
        group = next(g for g in optimizer.param_groups if "rank" in g)
        for index, parameter in enumerate(self._projected):
            if index in state["projections"]:
                projector = optimizer.projectors[parameter] = build_projector(group)
                projector.ortho_matrix = state["projections"][index].to(parameter.device)


def _step_alone(optimizer: Optimizer, parameter: torch.Tensor) -> None:
    """Step the only weight that has a gradient, and free the gradient."""
    optimizer.step()
    parameter.grad = None
