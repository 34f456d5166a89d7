"""LoRA (Hu et al. 2021, arXiv 2106.09685) and DoRA (Liu et al. 2024, arXiv 2402.09353), through PEFT.

y = W x + (alpha/r) B A x, with A [r, in], B [out, r], W frozen and B zero at the start. DoRA trains the direction of
W + (alpha/r) B A in this way, and also the magnitude of each of its rows. On an NF4 base they are QLoRA and QDoRA. With
`optim.loraplus_ratio` B (and the magnitude) learn faster than A: LoRA+ (Hayou et al. 2024, arXiv 2402.12354).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import AdamW, Optimizer

from rankloom.adapters.modules import use_exact_module_names
from rankloom.adapters.unshift_init import save_without_base_change
from rankloom.config.method import DoraConfig, LoraConfig
from rankloom.config.trial import OptimConfig
from rankloom.errors import IncompatibleError
from rankloom.methods.base import Method, has_conv1d, list_peft_parameters, list_peft_targets, make_adam_settings
from rankloom.models import Base, check_experts

INIT: dict[str, Any] = {
    "default": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "pissa": "pissa",
    "olora": "olora",
}


class Lora(Method[LoraConfig | DoraConfig]):
    """Plain or rank-stabilised LoRA."""

    use_dora = False

    def attach(self, base: Base) -> nn.Module:
        config = self.config
        if config.init == "olora" and has_conv1d(base):
            raise IncompatibleError(
                f"method.init=olora: PEFT does not support it on the Conv1D layers of {base.id}; use "
                f"default, pissa or gaussian"
            )
        self.notes += check_experts(base.model, config)
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            use_dora=self.use_dora,
            init_lora_weights=INIT[config.init],
            target_modules=list_peft_targets(base, config),
            target_parameters=list_peft_parameters(base) if config.experts else None,
            fan_in_fan_out=has_conv1d(base),
        )
        with use_exact_module_names():
            model = peft.get_peft_model(base.model, lora)
        lora.base_model_name_or_path = base.id
        # PiSSA and OLoRA move a part of W into the adapter: keep it, so that the export can give it back
        self._moved = (
            {n: p.detach().to("cpu", copy=True) for n, p in self.get_trained(model).items()}
            if config.init in ("pissa", "olora")
            else None
        )
        return model

    def build_optimizer(self, model: nn.Module, optim: OptimConfig) -> Optimizer:
        optimizer: Optimizer = create_loraplus_optimizer(
            model,
            AdamW,
            loraplus_lr_ratio=optim.loraplus_ratio,
            loraplus_weight_decay=optim.weight_decay,
            loraplus_lr_embedding=optim.learning_rate,
            **make_adam_settings(optim),
        )
        return optimizer

    def export(self, model: nn.Module, base: Base, folder: Path) -> float | None:
        assert isinstance(model, peft.PeftModel)
        if self._moved is not None:
            save_without_base_change(model, self._moved, folder)
        else:
            model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        return None


class Dora(Lora):
    """LoRA with `use_dora`: equal hooks, and one more trained vector per layer."""

    use_dora = True
