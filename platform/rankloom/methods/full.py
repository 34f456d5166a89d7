"""Full fine-tuning: every weight trains. The yardstick of the others; FSDP2 on several workers."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from rankloom.adapters.extract import extract_adapter
from rankloom.config.method import FullConfig, FullRankConfig
from rankloom.methods.base import Method
from rankloom.models import Base

FullRankT = TypeVar("FullRankT", bound=FullRankConfig)


class BaseTraining(Method[FullRankT]):
    """What full, GaLore and LISA share: the base's own weights change, and the difference is extracted."""

    trains_base = True

    def attach(self, base: Base) -> nn.Module:
        return base.model.requires_grad_(True)

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return dict(model.named_parameters())

    def export(self, model: nn.Module, base: Base, folder: Path) -> float | None:
        assert isinstance(model, PreTrainedModel)
        return extract_adapter(model, base.folder, self.config.extract_rank, folder, base.id)


class Full(BaseTraining[FullConfig]):
    """Nothing to add: the defaults train everything."""
