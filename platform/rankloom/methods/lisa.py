"""LISA (Pan et al. 2024, arXiv 2403.17919): embedding and head always train, and `num_layers` random layers with them.

A new set is drawn every `interval` steps from the seed and the step, so that a resumed run draws equally. The moments
of layers that leave the set are freed, which is how the method saves memory. The final norm stays frozen.
"""

from __future__ import annotations

import random

from torch import nn
from torch.optim import AdamW, Optimizer

from rankloom.config.method import LisaConfig
from rankloom.config.trial import OptimConfig
from rankloom.methods.base import make_adam_settings, split_decay_groups
from rankloom.methods.full import BaseTraining
from rankloom.models import Base, find_decoder_layers


class Lisa(BaseTraining[LisaConfig]):
    """Full-rank training of a few layers that change over time."""

    def attach(self, base: Base) -> nn.Module:
        self._layers = find_decoder_layers(base.model)
        self.config.check_depth(len(self._layers))
        super().attach(base)
        base.model.requires_grad_(False)
        base.model.get_input_embeddings().requires_grad_(True)
        if (head := base.model.get_output_embeddings()) is not None:
            head.requires_grad_(True)
        self._active: frozenset[int] = frozenset()
        self._activate(0)
        return base.model

    def get_trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        layers = {id(p) for layer in self._layers for p in layer.parameters()}
        return {name: p for name, p in super().get_trained(model).items() if p.requires_grad or id(p) in layers}

    def build_optimizer(self, model: nn.Module, optim: OptimConfig) -> Optimizer:
        # over all layers, so that the groups never change; a frozen layer has no gradient and hence no moments
        return AdamW(split_decay_groups(self.get_trained(model).values(), optim), **make_adam_settings(optim))

    def before_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> bool:
        if not self._activate(step):
            return False
        for parameter in [p for p in optimizer.state if not p.requires_grad]:
            del optimizer.state[parameter]
            parameter.grad = None
        return True

    def _activate(self, step: int) -> bool:
        """Switch to the layers drawn for `step`; return whether they differ from the current ones."""
        draw = random.Random(f"{self.seed}:{step // self.config.interval}")
        drawn = frozenset(draw.sample(range(len(self._layers)), self.config.num_layers))
        changed = drawn != self._active
        self._active = drawn
        for index, layer in enumerate(self._layers):
            layer.requires_grad_(index in drawn)
        self._freeze()
        return changed
