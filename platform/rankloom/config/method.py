"""Settings of the fine-tuning methods: one class each, distinguished by `type`.

Quantisation and LoRA+ are not methods but orthogonal settings: QLoRA is lora on an nf4 base, LoRA+ is
`optim.loraplus_ratio`. `compatible.py` has the allowed combinations. Read `rankloom/methods` next.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from rankloom.config.base import Frozen, OpenUnion
from rankloom.config.compatible import COMPATIBLE, Compatibility
from rankloom.config.memory import (
    THROUGH_FROZEN,
    THROUGH_TRAINED,
    ModelShape,
    TrainedNumbers,
    count_adapter_terms,
    count_full_terms,
)
from rankloom.config.plugins import load_external_methods
from rankloom.errors import ConfigError

Rank = Annotated[int, Field(ge=1, le=4096)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _check_targets(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        return value
    raise ConfigError(f"expected all-linear, a list of layer names or a regular expression (given {value!r})")


Targets = Annotated[list[str] | str, BeforeValidator(_check_targets)]
"""A choice of linear layers, which `rankloom.models.find_target_linears` resolves."""


class MethodConfig(Frozen):
    """What every method's settings say of the method; those of rankloom's own are in tables."""

    compatible: ClassVar[Compatibility | None] = None
    """The row of another package's method; None: `COMPATIBLE` has it."""
    implementation: ClassVar[str] = ""
    """`module:Class` of another package's method, a `rankloom.methods.Method`; empty: `METHODS` has it."""

    @property
    def row(self) -> Compatibility:
        """Return what the method can be combined with."""
        return self.compatible or COMPATIBLE[type(self).model_fields["type"].default]


class AdapterConfig(MethodConfig):
    """Settings that every adapter method has."""

    default_rank: ClassVar[int] = 16
    """What memory is planned with for a method without a setting `rank`."""

    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank (by alpha / sqrt(rank) with rsLoRA)."""
    dropout: Fraction = 0.0
    """Dropout probability on the adapter's input."""
    target_modules: Targets = "all-linear"
    """`all-linear` (every linear layer but the head), a list of layer names, or a regular expression."""
    experts: bool | None = None
    """Whether to adapt the experts of a mixture-of-experts model too. true: adapt them (lora only, in its own run);
    false: leave them as they are; null: leave them, with a note. It matters where experts are stacked matrices, which
    `target_modules` can't name."""

    def count_trained(self, shape: ModelShape) -> TrainedNumbers:
        """Return what the method keeps in memory; a method that keeps more than AdamW's moments overrides it."""
        return count_adapter_terms(shape, int(getattr(self, "rank", self.default_rank)))


class LoraConfig(AdapterConfig):
    """LoRA (arXiv 2106.09685): W + (alpha/r)·B·A with W frozen."""

    type: Literal["lora"] = "lora"
    rank: Rank = 16
    """Rank of the update (r)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """Initialisation of A and B. pissa (arXiv 2404.02948) and olora (arXiv 2406.01775) move a part of W into the
    adapter; the export converts the result to plain LoRA of twice the rank."""


class DoraConfig(AdapterConfig):
    """DoRA (arXiv 2402.09353): LoRA on the direction of each weight row, with a trained magnitude."""

    type: Literal["dora"] = "dora"
    rank: Rank = 16
    """Rank of the update (r)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    init: Literal["default", "gaussian"] = "default"
    """Initialisation of A and B."""

    def count_trained(self, shape: ModelShape) -> TrainedNumbers:
        """Return what the method keeps in memory."""
        return count_adapter_terms(shape, self.rank, dora=True)


class AdaLoraConfig(AdapterConfig):
    """AdaLoRA (arXiv 2303.10512): a rank budget, reallocated to the layers where it matters most."""

    type: Literal["adalora"] = "adalora"
    initial_rank: Rank = 12
    """Rank of every layer at the start."""
    target_rank: Rank = 8
    """Average rank at the end."""
    warmup_fraction: Fraction = 0.1
    """Fraction of the steps before the first rank is pruned."""
    final_fraction: Fraction = 0.3
    """Fraction of the steps, at the end, with fixed ranks."""
    interval: Annotated[int, Field(ge=1)] = 5
    """Steps between two reallocations."""
    orthogonal_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the orthogonality penalty on P and Q."""

    @model_validator(mode="after")
    def _check_budget(self) -> AdaLoraConfig:
        if self.target_rank >= self.initial_rank:
            raise ConfigError(f"target_rank {self.target_rank} must be below initial_rank {self.initial_rank}")
        if self.warmup_fraction + self.final_fraction >= 1:
            raise ConfigError("warmup_fraction + final_fraction must be below 1, or no step is left to adapt in")
        return self

    def split_steps(self, num_steps: int) -> tuple[int, int]:
        """Return the steps before the first rank is pruned, and those at the end with fixed ranks.

        Raises:
            ConfigError: there are too few steps between them.
        """
        warmup, final = int(num_steps * self.warmup_fraction), max(1, int(num_steps * self.final_fraction))
        if num_steps - warmup - final < self.interval:
            raise ConfigError(
                f"budget: {num_steps} steps leave AdaLoRA {max(0, num_steps - warmup - final)} between its "
                f"warm-up ({warmup}) and its final phase ({final}), fewer than method.interval={self.interval}, so "
                f"that no rank would move; train longer or lower method.interval"
            )
        return warmup, final

    def count_trained(self, shape: ModelShape) -> TrainedNumbers:
        """Return what the method keeps in memory: beside Adam's moments, PEFT's three averages of each importance."""
        return count_adapter_terms(shape, self.initial_rank, moments=5, mixed_inputs=1.2)


class FullRankConfig(MethodConfig):
    """Settings of the methods that train the base's own weights."""

    extract_rank: Rank = 64
    """Rank at which the change of the weights is published as an adapter (truncated SVD)."""

    def count_trained(self, shape: ModelShape) -> TrainedNumbers:
        """Return what the method keeps in memory; one that keeps less than AdamW on all weights overrides it."""
        return count_full_terms(shape)


class FullConfig(FullRankConfig):
    """Full fine-tuning: every weight trains."""

    type: Literal["full"] = "full"


class GaLoreConfig(FullRankConfig):
    """GaLore (arXiv 2403.03507): every weight trains; Adam's moments live in a low-rank projection."""

    type: Literal["galore"] = "galore"
    rank: Rank = 128
    """Rank of the projection."""
    interval: Annotated[int, Field(ge=1)] = 50
    """Steps between two updates of the projection."""
    scale: Annotated[float, Field(gt=0)] = 0.25
    """Factor of the projected update."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the moments in 8 bits (bitsandbytes)."""
    layerwise: bool = False
    """Update each weight during the backward pass and free its gradient at once."""

    def count_trained(self, shape: ModelShape) -> TrainedNumbers:
        """Return what the method keeps in memory: moments in the projection, few gradients if layerwise."""
        projected = sum(2 * min(self.rank, *each) * max(each) for each in shape.linears)
        projections = sum(min(self.rank, *each) * min(each) for each in shape.linears)
        other = shape.num_other  # stacked experts too train without a projection
        moments = (projected + 2 * other) / (4 if self.optimizer == "adamw8bit" else 1)
        largest = max(other, *(wide * high for wide, high in shape.linears))
        return count_full_terms(shape, gradients=largest if self.layerwise else None, moments=moments + projections)


class LisaConfig(FullRankConfig):
    """LISA (arXiv 2403.17919): the embedding, the head and a few random layers train, redrawn during training."""

    type: Literal["lisa"] = "lisa"
    num_layers: Annotated[int, Field(ge=1)] = 2
    """Number of layers that train at a time."""
    interval: Annotated[int, Field(ge=1)] = 20
    """Steps between two draws."""

    def count_trained(self, shape: ModelShape) -> TrainedNumbers:
        """Return what the method keeps in memory: gradients and moments of the layers that train."""
        of_layers = shape.num_weights - shape.num_other + shape.num_stacked
        share = min(1.0, self.num_layers / shape.num_layers)
        active = shape.num_weights - of_layers * (1 - share)
        kept = share * THROUGH_TRAINED + (1 - share) * THROUGH_FROZEN
        return count_full_terms(shape, gradients=active, moments=2 * active, activations=kept)

    def check_depth(self, num_layers: int) -> None:
        """Raise ConfigError if the model has too few layers."""
        if self.num_layers > num_layers:
            raise ConfigError(f"method.num_layers: {self.num_layers} is more than the model's {num_layers} layers")


def _default_to_lora(value: Any) -> Any:
    """Read `method.rank=8` without a type as LoRA's, which is the default method."""
    return {"type": "lora", **value} if isinstance(value, dict) else value


Method = Annotated[
    FullConfig | LoraConfig | DoraConfig | AdaLoraConfig | GaLoreConfig | LisaConfig,
    OpenUnion(load_external_methods),
    BeforeValidator(_default_to_lora),
]
