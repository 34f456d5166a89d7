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

    @property
    def num_stacked(self) -> int:
        """Parameters of experts that are stacks of matrices; they count as others, and no method trains them whole."""

    def count_adapter_numbers(self, rank: int, *, dora: bool) -> int:
        """Return the numbers of A and B at this rank on all targets; with `dora` of the magnitudes too."""


THROUGH_ADAPTERS, THROUGH_TRAINED, THROUGH_FROZEN = 0.8, 0.92, 0.58
"""What a layer keeps for its backward pass, relative to a host's, measured: one with adapters, one whose weights train,
and a frozen one between those."""


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
    activations: float = THROUGH_ADAPTERS
    """What the layers keep for the backward pass, relative to a host's."""
    mixed_inputs: float = 0.0
    """Copies of each target's input, in the lower type, that adapters keep under autocast."""


def count_adapter_terms(
    shape: ModelShape, rank: int, *, dora: bool = False, moments: int = 2, mixed_inputs: float = 0.0
) -> TrainedNumbers:
    """Count the terms of adapters on a frozen base.

    Args:
        moments: numbers that last for each that trains; 2 with AdamW.
        mixed_inputs: as in `TrainedNumbers`.
    """
    numbers = shape.count_adapter_numbers(rank, dora=dora)
    return TrainedNumbers(numbers, numbers, moments * numbers, rank=rank, dora=dora, mixed_inputs=mixed_inputs)


def count_full_terms(
    shape: ModelShape,
    *,
    gradients: float | None = None,
    moments: float | None = None,
    activations: float = THROUGH_TRAINED,
) -> TrainedNumbers:
    """Count the terms of a method that trains the base's own weights; by default AdamW on all of them."""
    trained = shape.num_weights
    return TrainedNumbers(
        shape.num_weights,
        trained if gradients is None else gradients,
        2 * trained if moments is None else moments,
        on_frozen=False,
        activations=activations,
    )
