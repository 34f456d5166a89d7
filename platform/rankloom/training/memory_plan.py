"""Forecast the device memory of a host or a run before it trains. Pure.

A forecast adds up the memory at the peak of a step: the base at its quantisation, the trained parameters with their
gradients and Adam's moments, the activations that the backward pass needs, and the logits. `fit_host` inverts it: the
largest host for the memory. The factors are measured; `tests/parity/test_memory_plan.py` compares forecasts with
measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rankloom.banks.groups import PADDED
from rankloom.config.method import AdapterConfig, FullRankConfig
from rankloom.errors import TrialError

FP32 = 4
BYTES_A_WEIGHT = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes per quantised weight. nf4: 4 bits, an 8-bit scale per 64 weights, an fp32 one per 256 of those."""
LOGITS = 3.5
"""Number of fp32 copies of the logits while the loss and its gradient are computed."""
LASTING, PASSING = 4, 2
"""Number of fp32 copies of a bank's parameters. Lasting: the parameters, two moments, and the accumulated gradient.
Passing: a new gradient and its stacked copy, after the activations are freed."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a base, its targets and its data that determine memory."""

    linears: tuple[tuple[int, int], ...]
    """(in, out) of each linear layer except the head."""
    targets: tuple[tuple[int, int], ...]
    """(in, out) of each linear layer with adapters."""
    num_layers: int
    num_other: int
    """Number of parameters of embeddings, head and norms."""
    vocabulary: int
    activations: float
    """Size of the activations for the backward pass, relative to the inputs and outputs of all linear layers."""
    predicted_share: float
    """Share of the data's tokens that carry loss."""
    quantization: str
    value_bytes: int
    """Bytes per value that is not quantised."""
    padded: bool = False
    """Whether slots' tokens are padded to a common length, as on a GPU."""
    experts: tuple[tuple[int, int, int], ...] = ()
    """(experts, in, out) of each stack of experts' matrices with adapters."""

    @property
    def num_weights(self) -> int:
        return sum(wide * high for wide, high in self.linears) + self.num_other

    @property
    def base_bytes(self) -> float:
        linear = BYTES_A_WEIGHT.get(self.quantization, self.value_bytes)
        return (self.num_weights - self.num_other) * linear + self.num_other * self.value_bytes

    def token_bytes(self, rank: int, *, dora: bool) -> float:
        """Return the bytes per token of a forward and backward through adapters of a rank."""
        widths = self.activations * sum(wide + high for wide, high in self.linears)
        adapters = sum(rank + dora * high for _, high in self.targets)
        return (widths + adapters) * self.value_bytes + LOGITS * FP32 * self.vocabulary * self.predicted_share

    @property
    def padding_bytes(self) -> float:
        """Bytes per token for padding in the widest of a bank's products: its input, its output and one sum."""
        widest = max(wide + high + max(wide, high) for wide, high in self.targets)
        return self.padded * PADDED * widest * self.value_bytes

    def adapter_numbers(self, rank: int, *, dora: bool) -> int:
        stacks = sum(count * rank * (wide + high) for count, wide, high in self.experts)
        return sum(rank * (wide + high) + dora * high for wide, high in self.targets) + stacks

    @property
    def adapted_bytes(self) -> float:
        """Bytes of the experts' weights with their adapters added, and of the gradient of the largest stack."""
        stacks = [count * wide * high for count, wide, high in self.experts]
        return (sum(stacks) + max(stacks, default=0)) * self.value_bytes


@dataclass(frozen=True)
class HostSize:
    """The settings of a host that determine its memory."""

    num_slots: int
    max_rank: int
    token_budget: int
    with_magnitudes: bool

    def bytes(self, shape: Shape) -> float:
        """Return the peak bytes of a step, the base excluded."""
        bank = self._bank_bytes(shape)
        tokens = self._copy_bytes(shape) + self.token_budget * self._token_bytes(shape)
        return LASTING * bank + max(tokens, PASSING * bank)

    def room(self, shape: Shape, available: float) -> int:
        """Return the number of tokens that fit beside the bank into `available` bytes."""
        taken = LASTING * self._bank_bytes(shape) + self._copy_bytes(shape)
        return int((available - taken) / self._token_bytes(shape))

    def _bank_bytes(self, shape: Shape) -> float:
        return FP32 * self.num_slots * shape.adapter_numbers(self.max_rank, dora=self.with_magnitudes)

    def _copy_bytes(self, shape: Shape) -> float:
        """Return the bytes of A and B cast to the arithmetic's dtype, which every site keeps for the backward pass."""
        numbers = self.num_slots * shape.adapter_numbers(self.max_rank, dora=False)
        return numbers * shape.value_bytes if shape.value_bytes < FP32 else 0

    def _token_bytes(self, shape: Shape) -> float:
        return shape.token_bytes(self.max_rank, dora=self.with_magnitudes) + shape.padding_bytes


def fit_host(wanted: HostSize, shape: Shape, *, ranks: Sequence[int], longest: int, available: float) -> HostSize:
    """Return the wanted host, or the largest one that fits: with fewer tokens, then fewer slots, then lower ranks.

    Args:
        ranks: the ranks that slots may have.
        longest: tokens of the longest row, which must fit.
        available: bytes beside the base.

    Raises:
        TrialError: there is no room for a single slot.
    """
    for rank in sorted(ranks, reverse=True):
        for num_slots in range(wanted.num_slots, 0, -1):
            least = replace(wanted, num_slots=num_slots, max_rank=rank, token_budget=longest)
            if least.bytes(shape) <= available:
                return replace(least, token_budget=min(wanted.token_budget, least.room(shape, available)))
    needed = replace(wanted, num_slots=1, max_rank=min(ranks), token_budget=longest).bytes(shape)
    raise TrialError(
        f"not even one slot of rank {min(ranks)} with a row of {longest} tokens fits: it takes {gigabytes(needed)} "
        f"beside the base, and {gigabytes(available)} are free; lower data.max_length or method.rank, use "
        f"quantization: nf4, or a larger device"
    )


def run_bytes(shape: Shape, method: AdapterConfig | FullRankConfig, batch_tokens: int, *, num_shards: int = 1) -> float:
    """Return the peak bytes of a step in a dedicated run, base included.

    Args:
        batch_tokens: tokens of a worker's largest micro-batch, padding included; 0 with activation checkpointing.
        num_shards: number of workers that the weights are sharded over.
    """
    kept = method.trained_numbers(shape)
    tokens = batch_tokens * shape.token_bytes(kept.rank, dora=kept.dora)
    if batch_tokens:  # with checkpointing, experts are recomputed layer by layer
        tokens += shape.adapted_bytes
    lasting = (shape.base_bytes if kept.on_frozen else 0) + FP32 * (kept.weights + kept.moments)
    return lasting / num_shards + max(tokens, FP32 * kept.gradients / num_shards)


def gigabytes(size: float) -> str:
    """Format bytes as GB, to three digits."""
    return f"{size / 1e9:.3g} GB"
