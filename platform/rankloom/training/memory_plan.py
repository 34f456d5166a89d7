"""Forecast the device memory of a host or a run before it trains. Pure.

A forecast adds up the memory at the peak of a step: the base at its quantisation, the trained parameters with their
gradients and Adam's moments, the activations that the backward pass needs, and the logits. `fit_host` inverts it: the
largest host for the memory. The factors are measured; `tests/parity/test_memory_plan.py` compares forecasts with
measured peaks.

On the fast path a host also keeps shadows of its adapters, and graphs their step's memory beside that of steps which
are not recorded; it makes logits in chunks, and rounds ranks and tokens up. Evaluations keep nothing for a backward
pass: with their larger budget they stay below a step on models of eight layers or more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rankloom.banks.groups import PADDED, RANK_STEP
from rankloom.config.method import AdapterConfig, FullRankConfig
from rankloom.errors import TrialError
from rankloom.kernels.cross_entropy import MOST_LOGITS
from rankloom.training.fused.plan import MOST_RECORDED

FP32 = 4
BYTES_A_WEIGHT = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes per quantised weight. nf4: 4 bits, an 8-bit scale per 64 weights, an fp32 one per 256 of those."""
LOGITS = 3.5
"""Number of fp32 copies of the logits while the loss and its gradient are computed."""
OUTPUTS_OF_DORA = 2
"""Outputs that each target of a dedicated DoRA run keeps beside those of LoRA."""
MIXED = 1.4
"""What a dedicated run keeps under autocast, relative to its lower type alone: norms, for one, keep fp32."""
PASSING_LAYER = 0.8
"""What the backward pass of the widest layer holds in passing in fp32, relative to its inputs and outputs."""
LOGITS_OF_RUN = 3
"""Number of fp32 copies of a dedicated run's logits: their logarithms, and two gradients."""
LASTING, PASSING = 4, 2
"""Number of fp32 copies of a bank's parameters. Lasting: the parameters, two moments, and the accumulated gradient.
Passing: a new gradient and its stacked copy, after the activations are freed."""
CHUNKS = 2
"""Chunks of logits at a time on the fast path: one that is made, and the last one."""
ROUNDED = 1.125
"""The most that a recorded step's tokens are rounded up."""
STAGED = 48
"""Bytes of a token's indices on the device."""


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
    """Whether slots' tokens are padded to a common length, as on a GPU without the fast path."""
    fast: float | None = None
    """As `activations`, on the fast path; None: hosts do not take it."""
    recorded: bool = False
    """Whether its steps become CUDA graphs."""
    experts: tuple[tuple[int, int, int], ...] = ()
    """(experts, in, out) of each stack of experts' matrices with adapters."""
    num_stacked: int = 0
    """Number of parameters of all stacks of experts' matrices, which `num_other` includes; no quantisation does."""
    routed: int = 0
    """Inputs and outputs of the stacked experts that a token passes through, all layers together."""
    num_head: int = 0
    """Number of parameters of the output embedding, whose gradient is the first of a backward pass."""

    @property
    def num_weights(self) -> int:
        return sum(wide * high for wide, high in self.linears) + self.num_other

    @property
    def base_bytes(self) -> float:
        linear = BYTES_A_WEIGHT.get(self.quantization, self.value_bytes)
        return (self.num_weights - self.num_other) * linear + self.num_other * self.value_bytes

    def count_token_bytes(self, rank: int, *, dora: bool) -> float:
        """Return the bytes per token of a forward and backward through adapters of a rank."""
        widths = self.activations * sum(wide + high for wide, high in self.linears)
        adapters = sum(rank + dora * high for _, high in self.targets)
        return (widths + adapters) * self.value_bytes + LOGITS * FP32 * self.vocabulary * self.predicted_share

    def count_step_bytes(self, num_tokens: int, rank: int, *, dora: bool) -> float:
        """Return the bytes of a host's forward and backward."""
        if self.fast is None:
            return num_tokens * (self.count_token_bytes(rank, dora=dora) + self.padding_bytes)
        widths = self.fast * sum(wide + high for wide, high in self.linears)
        kept = (widths + dora * sum(high for _, high in self.targets)) * self.value_bytes
        logits = CHUNKS * min(num_tokens * self.vocabulary * self.predicted_share, MOST_LOGITS)
        return num_tokens * (kept + rank * FP32 * len(self.targets) + STAGED) + logits * self.value_bytes

    @property
    def padding_bytes(self) -> float:
        """Bytes per token for padding in the widest of a bank's products: its input, its output and one sum."""
        widest = max(wide + high + max(wide, high) for wide, high in self.targets)
        return self.padded * PADDED * widest * self.value_bytes

    def count_adapter_numbers(self, rank: int, *, dora: bool) -> int:
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

    def count_bytes(self, shape: Shape) -> float:
        """Return the peak bytes of a step, the base excluded."""
        bank, shadows = self._count_bank_bytes(shape), self._count_shadow_bytes(shape)
        step = max(shadows + self._count_step_bytes(shape, self.token_budget), PASSING * bank)
        if shape.recorded:  # graphs keep their memory, while a step of another size is computed beside them
            most = min(self.token_budget, MOST_RECORDED)
            step += max(self._count_step_bytes(shape, int(ROUNDED * most)), PASSING * bank)
        return LASTING * bank + step

    def find_room(self, shape: Shape, available: float) -> int:
        """Return the number of tokens, up to the budget, for which `count_bytes` fits into `available` bytes."""
        budgets = range(1, self.token_budget + 1)
        return bisect_right(
            budgets, available, key=lambda tokens: replace(self, token_budget=tokens).count_bytes(shape)
        )

    def _round_rank(self, shape: Shape) -> int:
        return -(-self.max_rank // RANK_STEP) * RANK_STEP if shape.fast is not None else self.max_rank

    def _count_bank_bytes(self, shape: Shape) -> float:
        return FP32 * self.num_slots * shape.count_adapter_numbers(self._round_rank(shape), dora=self.with_magnitudes)

    def _count_shadow_bytes(self, shape: Shape) -> float:
        """Return the bytes of A and B in the arithmetic's dtype: shadows, or what every site keeps for its backward."""
        numbers = self.num_slots * shape.count_adapter_numbers(self._round_rank(shape), dora=False)
        return numbers * shape.value_bytes if shape.fast is not None or shape.value_bytes < FP32 else 0

    def _count_step_bytes(self, shape: Shape, num_tokens: int) -> float:
        return shape.count_step_bytes(num_tokens, self._round_rank(shape), dora=self.with_magnitudes)


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
            if least.count_bytes(shape) <= available:
                whole = replace(least, token_budget=wanted.token_budget)
                return replace(least, token_budget=whole.find_room(shape, available))
    needed = replace(wanted, num_slots=1, max_rank=min(ranks), token_budget=longest).count_bytes(shape)
    raise TrialError(
        f"not even one slot of rank {min(ranks)} with a row of {longest} tokens fits: it takes {format_gb(needed)} "
        f"beside the base, and {format_gb(available)} are free; lower data.max_length or method.rank, use "
        f"quantization: nf4, or a larger device"
    )


@dataclass(frozen=True)
class RunMemory:
    """Bytes of a dedicated run on one worker, by part; gradients come as activations go, so `peak` is not their sum."""

    weights: float
    """The base, and what the method trains beside it."""
    gradients: float
    optimizer: float
    """Moments, and whatever else the method keeps from step to step."""
    activations: float
    """What the backward pass needs of a micro-batch."""
    logits: float
    workspace: float
    """What the backward pass of a layer, and of the head, holds in passing."""
    peak: float
    """The most at any moment of a step."""


def forecast_run(
    shape: Shape,
    method: AdapterConfig | FullRankConfig,
    batch_tokens: int,
    *,
    num_workers: int = 1,
    accumulates: bool = False,
    recomputes: bool = False,
    on_gpu: bool = False,
) -> RunMemory:
    """Forecast the memory of a dedicated run's step, base included.

    Args:
        batch_tokens: tokens of a worker's largest micro-batch, padding included.
        num_workers: number of workers; FSDP shards weights, gradients and moments over them, DDP keeps a second copy of
            the gradients to exchange.
        accumulates: whether gradients of one micro-batch wait for the next one.
        recomputes: whether layers are recomputed in the backward pass (activation checkpointing).
        on_gpu: whether AdamW steps all parameters at once, as torch does on CUDA, with a temporary of their size.
    """
    kept = method.count_trained(shape)
    is_mixed = shape.value_bytes < FP32
    scale = shape.activations * kept.activations * (MIXED if is_mixed else 1.0)
    widest = max((wide + high for wide, high in shape.linears), default=0)
    adapted = 0.0
    for wide, high in shape.targets if kept.rank else ():
        adapted += kept.rank + kept.dora * OUTPUTS_OF_DORA * high + is_mixed * kept.mixed_inputs * wide
    layers = scale * (sum(wide + high for wide, high in shape.linears) + shape.routed) + adapted
    activations = batch_tokens * layers * shape.value_bytes + (shape.adapted_bytes if kept.rank else 0)
    casts = is_mixed * shape.value_bytes * kept.weights  # autocast's copies of fp32 weights, kept until the backward
    if recomputes:  # a layer's input is kept, and one layer at a time is whole
        inputs = shape.num_layers * shape.linears[0][0] * batch_tokens * shape.value_bytes if shape.linears else 0
        activations = inputs + activations / shape.num_layers
    activations += casts
    logits = LOGITS_OF_RUN * FP32 * batch_tokens * shape.predicted_share * shape.vocabulary
    trains_head = not kept.on_frozen
    workspace = PASSING_LAYER * widest * batch_tokens * FP32 + trains_head * FP32 * shape.num_head
    is_sharded = method.row.parallel == "fsdp"
    shards = num_workers if is_sharded else 1
    gradients, optimizer = FP32 * kept.gradients / shards, FP32 * kept.moments / shards
    weights = ((shape.base_bytes if kept.on_frozen else 0) + FP32 * kept.weights) / shards
    exchanged = gradients if num_workers > 1 and not is_sharded else 0.0
    passing = activations + logits + workspace
    stepping = (1 + on_gpu) * gradients + trains_head * 2 * FP32 * shape.num_head  # Adam's denominator and update
    most = max(passing + accumulates * gradients, stepping)
    peak = weights + optimizer + exchanged + most
    return RunMemory(weights, gradients, optimizer, activations, logits, workspace + exchanged, peak)


def format_gb(size: float) -> str:
    """Format bytes as GB, to three digits."""
    return f"{size / 1e9:.3g} GB"
