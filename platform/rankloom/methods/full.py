"""Full fine-tuning: every weight that an adapter can hold trains. The reference of the others; FSDP2 on workers."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from rankloom.adapters.extract import extract_adapter, find_unsupported_parameters
from rankloom.config.method import FullConfig, FullRankConfig
from rankloom.methods.base import Method
from rankloom.models import Base, list_endings

FullRankT = TypeVar("FullRankT", bound=FullRankConfig)


class BaseTraining(Method[FullRankT]):
    """The common part of full, GaLore and LISA: the base's own weights change, and the difference is extracted."""

    trains_base = True

    def attach(self, base: Base) -> nn.Module:
        names = find_unsupported_parameters(base.model)
        parameters = dict(base.model.named_parameters())
        self._uncarried, self._frozen = frozenset(names), [parameters[name] for name in names]
        if names:
            self.notes.append(f"{len(names)} parameter(s) that no adapter can hold stay frozen: {list_endings(names)}")
        base.model.requires_grad_(True)
        self._freeze()
        return base.model

    def _freeze(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def get_trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in model.named_parameters() if name not in self._uncarried}

    def export(self, model: nn.Module, base: Base, folder: Path) -> float | None:
        assert isinstance(model, PreTrainedModel)
        return extract_adapter(model, base.folder, self.config.extract_rank, folder, base.id)


class Full(BaseTraining[FullConfig]):
    """Full fine-tuning; the defaults train everything."""
