"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512), through PEFT: W + (alpha/r) P·diag(lambda)·Q with a budget of rank.

Every layer starts at `initial_rank`; each singular triplet is scored by sensitivity and uncertainty, and the least
important are pruned until `target_rank` is left on average. The schedule covers the run's real number of steps. PEFT
adds the orthogonality penalty only if the model computes the loss; our loop does that, so the penalty is added here.
"""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from torch import nn

from rankloom.adapters.extract import convert_adalora
from rankloom.adapters.modules import use_exact_module_names
from rankloom.config.method import AdaLoraConfig
from rankloom.methods.base import Method, State, has_conv1d, list_peft_targets
from rankloom.models import Base, check_experts


class AdaLora(Method[AdaLoraConfig]):
    """LoRA in singular value form, with ranks that differ between layers at the end."""

    def attach(self, base: Base) -> nn.Module:
        config = self.config
        warmup, final = config.split_steps(self.num_steps)
        adalora = peft.AdaLoraConfig(
            task_type="CAUSAL_LM",
            init_r=config.initial_rank,
            target_r=config.target_rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            tinit=warmup,
            tfinal=final,
            deltaT=config.interval,
            orth_reg_weight=config.orthogonal_weight,
            total_step=self.num_steps,
            target_modules=list_peft_targets(base, config),
            fan_in_fan_out=has_conv1d(base),
        )
        self.notes += check_experts(base.model, config)
        with use_exact_module_names():
            model = peft.get_peft_model(base.model, adalora)
        adalora.base_model_name_or_path = base.id
        self._peft = adalora
        self._allocator, self._device = model.base_model.rankallocator, base.device
        return model

    def compute_penalty(self, model: nn.Module) -> torch.Tensor | None:
        if self.config.orthogonal_weight == 0:
            return None
        norms = []
        for name, factor in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
                norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return self.config.orthogonal_weight * torch.stack(norms).mean()

    def after_step(self, model: nn.Module, step: int) -> None:
        for parameter in self.get_trained(model).values():
            if parameter.grad is None:  # an expert's layer that no token of the step reached
                parameter.grad = torch.zeros_like(parameter)
        model.base_model.update_and_allocate(step)  # type: ignore[union-attr, operator]

    def get_state(self) -> State:
        scores = {name: dict(getattr(self._allocator, name)) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
        return {"scores": scores, "rank_pattern": self._peft.rank_pattern}

    def load_state(self, state: State) -> None:
        for name, values in state["scores"].items():
            setattr(self._allocator, name, {key: score.to(self._device) for key, score in values.items()})
        self._peft.rank_pattern = state["rank_pattern"]

    def export(self, model: nn.Module, base: Base, folder: Path) -> float | None:
        assert isinstance(model, peft.PeftModel)
        convert_adalora(model, folder)
        return None
