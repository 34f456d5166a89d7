"""What a method keeps in memory: the terms that `training/memory_plan.py` adds a forecast up from; pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class ModelShape(Protocol):
    """A model and its adapters' targets, as far as a method's memory goes."""

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each linear layer but the head."""

    @property
    def targets(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of those that adapters sit on."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_other(self) -> int:
        """Parameters of embeddings, head and norms."""

    @property
    def num_weights(self) -> int:
        """All parameters of the base."""

    def adapter_numbers(self, rank: int, *, dora: bool) -> int:
        """Numbers of A and B at this rank on all targets; with `dora` of the magnitudes too."""


@dataclass(frozen=True)
class TrainedNumbers:
    """How many numbers a method keeps in fp32, on one worker, at the worst moment of a step."""

    weights: float
    """Beside the frozen base; for a method that trains the base's own weights, these are all there are."""
    gradients: float
    moments: float
    """The optimiser's state, and whatever else lasts from step to step."""
    on_frozen: bool = True
    """Whether a frozen base is there too."""
    rank: int = 0
    """Ranks of the adapters that tokens go through; 0: none."""
    dora: bool = False
    """Whether the adapters have magnitudes."""


def adapter_terms(shape: ModelShape, rank: int, *, dora: bool = False, moments: int = 2) -> TrainedNumbers:
    """Return the terms of adapters on a frozen base.

    Args:
        moments: numbers that last for each that trains; 2 with AdamW.
    """
    numbers = shape.adapter_numbers(rank, dora=dora)
    return TrainedNumbers(numbers, numbers, moments * numbers, rank=rank, dora=dora)


def full_terms(shape: ModelShape, *, gradients: float | None = None, moments: float | None = None) -> TrainedNumbers:
    """Return the terms of a method that trains the base's own weights; by default AdamW on all."""
    whole = shape.num_weights
    return TrainedNumbers(
        whole,
        whole if gradients is None else gradients,
        2 * whole if moments is None else moments,
        on_frozen=False,
    )
