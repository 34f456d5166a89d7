"""The method's settings, what it goes with, and what it keeps in memory; no torch."""

from typing import ClassVar, Literal

from rankloom.config.compatible import Compatibility
from rankloom.config.memory import ModelShape, TrainedNumbers
from rankloom.config.method import AdapterConfig, Rank


class LoraFaConfig(AdapterConfig):
    """LoRA-FA (arXiv 2308.03303): LoRA with a frozen A."""

    type: Literal["lora-fa"] = "lora-fa"
    rank: Rank = 16
    """Rank of the update (r)."""

    compatible: ClassVar[Compatibility] = Compatibility(
        quantization=frozenset({"none", "int8", "nf4"}),
        loraplus=False,
        fusable=False,
        servable="itself",
        parallel="ddp",
    )
    implementation: ClassVar[str] = "lora_fa.method:LoraFa"

    def count_trained(self, shape: ModelShape) -> TrainedNumbers:
        """Return the terms of LoRA, with gradients and moments of B alone."""
        both = shape.count_adapter_numbers(self.rank, dora=False)
        b = sum(self.rank * out for _, out in shape.targets)
        return TrainedNumbers(both, b, 2 * b, rank=self.rank)
