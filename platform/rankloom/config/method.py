"""The fine-tuning methods' own settings: one class each, told apart by `type`.

Quantisation and LoRA+ are no methods but orthogonal knobs: QLoRA is lora on an nf4 base, LoRA+ is
`optim.loraplus_ratio`. `compatible.py` says what goes with what. Read `rankloom/methods` next.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rankloom.config.base import Frozen
from rankloom.errors import ConfigError

Rank = Annotated[int, Field(ge=1, le=4096)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _names_or_pattern(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        return value
    raise ConfigError(f"expected all-linear, a list of layer names or a regular expression (given {value!r})")


Targets = Annotated[list[str] | str, BeforeValidator(_names_or_pattern)]
"""Which linear layers are meant; `rankloom.models.find_target_linears` resolves it."""


class AdapterConfig(Frozen):
    """What every adapter method shares."""

    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter's product is scaled by alpha / rank (by alpha / sqrt(rank) with rsLoRA)."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    target_modules: Targets = "all-linear"
    """`all-linear` (every linear layer but the head), a list of names, or a regular expression."""
    experts: bool | None = None
    """Of a mixture-of-experts model, whose experts are stacks of matrices and no layers. true: adapt them too (lora, in
    a run of its own); false: leave them as they are; null: leave them, and say so."""


class LoraConfig(AdapterConfig):
    """LoRA (arXiv 2106.09685): W + (alpha/r)·B·A with W frozen."""

    type: Literal["lora"] = "lora"
    rank: Rank = 16
    """Rank of the update."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """How A and B begin. pissa (arXiv 2404.02948) and olora (arXiv 2406.01775) move a part of W into the adapter;
    the export gives it back, at twice the rank."""


class DoraConfig(AdapterConfig):
    """DoRA (arXiv 2402.09353): LoRA on the direction of each weight row, with a trained magnitude."""

    type: Literal["dora"] = "dora"
    rank: Rank = 16
    """Rank of the update."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    init: Literal["default", "gaussian"] = "default"
    """How A and B begin."""


class AdaLoraConfig(AdapterConfig):
    """AdaLoRA (arXiv 2303.10512): a budget of rank, moved to the layers where it matters."""

    type: Literal["adalora"] = "adalora"
    initial_rank: Rank = 12
    """Rank of every layer at the start."""
    target_rank: Rank = 8
    """Average rank at the end."""
    warmup_fraction: Fraction = 0.1
    """Share of the steps before the first rank is taken away."""
    final_fraction: Fraction = 0.3
    """Share of the steps, at the end, in which the ranks stay as they are."""
    interval: Annotated[int, Field(ge=1)] = 5
    """Steps between two reallocations."""
    orthogonal_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the orthogonality penalty on P and Q."""

    @model_validator(mode="after")
    def _budget_shrinks(self) -> AdaLoraConfig:
        if self.target_rank >= self.initial_rank:
            raise ConfigError(f"target_rank {self.target_rank} must be below initial_rank {self.initial_rank}")
        if self.warmup_fraction + self.final_fraction >= 1:
            raise ConfigError("warmup_fraction + final_fraction must be below 1, or no step is left to adapt in")
        return self


class FullRankConfig(Frozen):
    """What the methods that change the base's own weights share."""

    extract_rank: Rank = 64
    """Rank at which the weights' difference is published as an adapter (truncated SVD)."""


class FullConfig(FullRankConfig):
    """Full fine-tuning: every weight trains."""

    type: Literal["full"] = "full"


class GaLoreConfig(FullRankConfig):
    """GaLore (arXiv 2403.03507): every weight trains; Adam's moments live in a low-rank projection."""

    type: Literal["galore"] = "galore"
    rank: Rank = 128
    """Rank of the projection."""
    interval: Annotated[int, Field(ge=1)] = 50
    """Steps between two computations of the projection."""
    scale: Annotated[float, Field(gt=0)] = 0.25
    """The projected update is multiplied by this."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the moments in 8 bits (bitsandbytes)."""
    layerwise: bool = False
    """Update each weight during the backward pass and free its gradient at once."""


class LisaConfig(FullRankConfig):
    """LISA (arXiv 2403.17919): embedding, head and a random few layers train, resampled as training goes."""

    type: Literal["lisa"] = "lisa"
    num_layers: Annotated[int, Field(ge=1)] = 2
    """Layers that train at a time."""
    interval: Annotated[int, Field(ge=1)] = 20
    """Steps between two draws."""

    def check_depth(self, num_layers: int) -> None:
        """Raise ConfigError where a model has too few layers."""
        if self.num_layers > num_layers:
            raise ConfigError(f"method.num_layers: {self.num_layers} is more than the model's {num_layers} layers")


def _lora_unless_said(value: Any) -> Any:
    """`method.rank=8` on a config without a method means LoRA's, since LoRA is the default."""
    return {"type": "lora", **value} if isinstance(value, dict) else value


Method = Annotated[
    FullConfig | LoraConfig | DoraConfig | AdaLoraConfig | GaLoreConfig | LisaConfig,
    Field(discriminator="type"),
    BeforeValidator(_lora_unless_said),
]
