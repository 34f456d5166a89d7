"""The method itself, through PEFT."""

from pathlib import Path

import peft
from torch import nn

from rankloom.methods.base import Method, has_conv1d, list_peft_targets
from rankloom.models import Base

from .config import LoraFaConfig


class LoraFa(Method[LoraFaConfig]):
    """B trains, on A as it was drawn."""

    def attach(self, base: Base) -> nn.Module:
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            target_modules=list_peft_targets(base, self.config),
            fan_in_fan_out=has_conv1d(base),
        )
        model = peft.get_peft_model(base.model, lora)
        lora.base_model_name_or_path = base.id
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
        return model

    def get_trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return A too: it is drawn anew by each run, so that a checkpoint of B alone would not restore the adapter."""
        return {name: p for name, p in model.named_parameters() if ".lora_" in name}

    def export(self, model: nn.Module, base: Base, folder: Path) -> float | None:
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)  # type: ignore[operator]
        return None
