"""What a host or a run needs of its device's memory, before it trains. Pure.

A forecast adds up what is there at the worst moment of a step: the base at its quantisation, what trains with its
gradients and Adam's moments, the activations that the backward pass needs, and the logits. `fit` turns it around: how
large a host may be. The factors were measured; `tests/parity/test_memory_plan.py` holds forecasts to measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rankloom.banks.groups import PADDED
from rankloom.config.method import AdapterConfig, FullRankConfig
from rankloom.errors import TrialError

FP32 = 4
BYTES_A_WEIGHT = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Of a quantised linear layer. nf4: 4 bits, an 8-bit scale for 64 weights, an fp32 one for 256 of those."""
LOGITS = 3.5
"""fp32 copies of the logits while the loss and its gradient are computed."""
LASTING, PASSING = 4, 2
"""fp32 copies of what trains in a bank. Lasting: itself, two moments, and the gradient of an unfinished step. Passing:
the gradient as it is found and as it is stacked, when the activations are gone."""


@dataclass(frozen=True)
class Shape:
    """A base, its targets and its data, as far as memory goes."""

    linears: tuple[tuple[int, int], ...]
    """(in, out) of each linear layer but the head."""
    targets: tuple[tuple[int, int], ...]
    """Of those that adapters sit on."""
    num_layers: int
    num_other: int
    """Parameters of embeddings, head and norms."""
    vocabulary: int
    activations: float
    """What the backward pass needs, in units of all that goes into and comes out of the linear layers."""
    predicted_share: float
    """Of the data's tokens, those that are predicted."""
    quantization: str
    value_bytes: int
    """Of a number that is not quantised."""
    padded: bool = False
    """Whether slots' tokens are padded to those of others: on a GPU."""
    experts: tuple[tuple[int, int, int], ...] = ()
    """(experts, in, out) of each stack of their matrices that adapters sit on."""

    @property
    def num_weights(self) -> int:
        return sum(wide * high for wide, high in self.linears) + self.num_other

    @property
    def base_bytes(self) -> float:
        linear = BYTES_A_WEIGHT.get(self.quantization, self.value_bytes)
        return (self.num_weights - self.num_other) * linear + self.num_other * self.value_bytes

    def token_bytes(self, rank: int, *, dora: bool) -> float:
        """What a token takes in a forward and backward through adapters of a rank."""
        widths = self.activations * sum(wide + high for wide, high in self.linears)
        adapters = sum(rank + dora * high for _, high in self.targets)
        return (widths + adapters) * self.value_bytes + LOGITS * FP32 * self.vocabulary * self.predicted_share

    @property
    def padding_bytes(self) -> float:
        """What a token takes in the widest of a bank's products: its input, its output and what is added to either."""
        widest = max(wide + high + max(wide, high) for wide, high in self.targets)
        return self.padded * PADDED * widest * self.value_bytes

    def adapter_numbers(self, rank: int, *, dora: bool) -> int:
        stacks = sum(count * rank * (wide + high) for count, wide, high in self.experts)
        return sum(rank * (wide + high) + dora * high for wide, high in self.targets) + stacks

    @property
    def adapted_bytes(self) -> float:
        """Of experts with what is added to them: kept for the backward pass, and the gradient of one stack in it."""
        stacks = [count * wide * high for count, wide, high in self.experts]
        return (sum(stacks) + max(stacks, default=0)) * self.value_bytes


@dataclass(frozen=True)
class HostSize:
    """What a host is opened with."""

    num_slots: int
    max_rank: int
    token_budget: int
    with_magnitudes: bool

    def bytes(self, shape: Shape) -> float:
        """What it takes beside its base, at the worst moment of a step."""
        bank = self._bank_bytes(shape)
        tokens = self._copy_bytes(shape) + self.token_budget * self._token_bytes(shape)
        return LASTING * bank + max(tokens, PASSING * bank)

    def room(self, shape: Shape, available: float) -> int:
        """Tokens that the bank leaves room for."""
        taken = LASTING * self._bank_bytes(shape) + self._copy_bytes(shape)
        return int((available - taken) / self._token_bytes(shape))

    def _bank_bytes(self, shape: Shape) -> float:
        return FP32 * self.num_slots * shape.adapter_numbers(self.max_rank, dora=self.with_magnitudes)

    def _copy_bytes(self, shape: Shape) -> float:
        """Of A and B in the type of the arithmetic, which every site keeps for the backward pass."""
        numbers = self.num_slots * shape.adapter_numbers(self.max_rank, dora=False)
        return numbers * shape.value_bytes if shape.value_bytes < FP32 else 0

    def _token_bytes(self, shape: Shape) -> float:
        return shape.token_bytes(self.max_rank, dora=self.with_magnitudes) + shape.padding_bytes


def fit_host(wanted: HostSize, shape: Shape, *, ranks: Sequence[int], longest: int, available: float) -> HostSize:
    """The host that is wanted, or what of it there is room for: fewer tokens at once, then fewer slots, then no slots
    for the highest ranks.

    Args:
        ranks: that slots may have.
        longest: tokens of the longest row, which has to fit.
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
        f"not even one slot of rank {min(ranks)} with a row of {longest} tokens fits: that takes {gigabytes(needed)} "
        f"beside the base, and {gigabytes(available)} are free; lower data.max_length or method.rank, use "
        f"quantization: nf4, or a larger device"
    )


def run_bytes(shape: Shape, method: AdapterConfig | FullRankConfig, batch_tokens: int, *, num_shards: int = 1) -> float:
    """What a run of its own takes, base included, at the worst moment of a step.

    Args:
        method: its config.
        batch_tokens: of the largest micro-batch of a worker, padding included.
        num_shards: workers that share the weights out.
    """
    kept = method.trained_numbers(shape)
    tokens = batch_tokens * shape.token_bytes(kept.rank, dora=kept.dora)
    if batch_tokens:  # else it is recomputed layer by layer
        tokens += shape.adapted_bytes
    lasting = (shape.base_bytes if kept.on_frozen else 0) + FP32 * (kept.weights + kept.moments)
    return lasting / num_shards + max(tokens, FP32 * kept.gradients / num_shards)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
