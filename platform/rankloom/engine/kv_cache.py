"""KvCache: the keys and values of every sequence's tokens, in buckets of sequences of similar lengths.

Attention over many sequences at once is fastest on one dense block, and a block is as wide as its longest sequence. So
sequences lie in buckets, whose widths are powers of two; one that outgrows its bucket moves to the next, so that each
token moves at most once per doubling. In a bucket the sequences take the first places, without gaps: a block is a view,
never gathered. A step allocates nothing; a bucket is resized when it has no place left, within the budget of tokens.

Layers that keep no keys and values, such as recurrences, have `States` of each sequence instead. They never change: a
step makes new ones, so that a prefix can keep them as they are.

Shapes: R places of a bucket, H key and value heads, T width, E width of a head, t tokens, F numbers of a token in all
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

NARROWEST = 256
"""Width of the first bucket, in tokens."""
CPU_TOKENS, CPU_PREFIX_TOKENS = 16384, 8192
"""Capacity of a cache, and of the prefixes kept beside it, on a CPU, in tokens."""
GPU_SHARE, GPU_PREFIX_SHARE = 0.5, 0.1
"""Their shares of the GPU memory that the base leaves; the rest is for adapters and activations."""
States = tuple[Tensor, ...]
"""What layers keep of one sequence as a whole, each [1, ...]."""
MOST_PREFIX_TOKENS = 65536
"""More are not kept by default: finding the prefix to drop takes the longer, the more there are."""


def choose_bucket_width(length: int) -> int:
    """Return the width of the bucket for a sequence of this many tokens."""
    return max(NARROWEST, 1 << (length - 1).bit_length())


@dataclass(frozen=True)
class LayerShape:
    """The keys and values that a layer keeps of each token."""

    num_heads: int
    key_width: int
    value_width: int
    source: int
    """The layer whose keys and values it reads: itself, or an earlier one, and then it keeps none."""

    @property
    def num_numbers(self) -> int:
        return self.num_heads * (self.key_width + self.value_width)


@dataclass(frozen=True)
class KvShape:
    """What a model keeps of each token and of each sequence."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device
    bytes_per_sequence: int = 0
    """Those of its `States`."""

    @classmethod
    def repeat(cls, num_layers: int, num_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> KvShape:
        """Return the shape of layers that keep as much each."""
        return cls(tuple(LayerShape(num_heads, width, width, i) for i in range(num_layers)), dtype, device)

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.num_numbers for layer in self.layers) * self.dtype.itemsize

    @property
    def bytes_per_kept_token(self) -> int:
        """Those of a token of a prefix; where layers keep nothing of tokens, its share of the states."""
        return self.bytes_per_token or -(-self.bytes_per_sequence // NARROWEST)

    def count_state_bytes(self, num_seqs: int) -> int:
        """Return the most bytes of the states of sequences that run: a step has those before it and those after it."""
        return 2 * num_seqs * self.bytes_per_sequence

    @property
    def tokens_per_states(self) -> int:
        """Tokens of a prefix that take the memory of a sequence's states."""
        return -(-self.bytes_per_sequence // self.bytes_per_kept_token) if self.bytes_per_sequence else 0

    @property
    def attends(self) -> bool:
        """Whether there are keys and values."""
        return any(layer.num_heads for layer in self.layers)

    @property
    def is_uniform(self) -> bool:
        """Whether all keys and values have one shape."""
        return len({(at.num_heads, width) for at in self.layers for width in (at.key_width, at.value_width)}) == 1


def choose_capacity(shape: KvShape, free: float | None, num_seqs: int, longest: int | None) -> int:
    """Return the capacity, in tokens, of a cache.

    Args:
        free: bytes of GPU memory that the base leaves; None: on a CPU.
        longest: the most tokens of a sequence; None: any number.
    """
    if free is None:
        return CPU_TOKENS
    tokens = int(max(0, GPU_SHARE * free - shape.count_state_bytes(num_seqs))) // max(1, shape.bytes_per_token)
    most = num_seqs * choose_bucket_width(longest) if longest else tokens
    return max(NARROWEST, min(tokens, most))


def choose_prefix_capacity(shape: KvShape, free: float | None) -> int:
    """Return the number of tokens of earlier sequences to keep; `free` as in `choose_capacity`."""
    if free is None:
        return CPU_PREFIX_TOKENS
    return min(MOST_PREFIX_TOKENS, int(GPU_PREFIX_SHARE * free) // shape.bytes_per_kept_token)


def find_longest(model: PreTrainedModel) -> int | None:
    """Return the most tokens that the base has positions for; None: any number."""
    shape = model.config.get_text_config()
    known = [getattr(shape, name, None) for name in ("max_position_embeddings", "max_seq_len")]  # the second is MPT's
    rope = getattr(shape, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # which changes the angles of a whole step beyond this length
        known.append(rope["original_max_position_embeddings"])
    return min(filter(None, known), default=None)


class KvBucket:
    """Sequences of up to `width` tokens in one block."""

    def __init__(self, shape: KvShape, width: int) -> None:
        self.width = width
        self.ids: list[str] = []
        """Request ids by place."""
        # zeros: what is masked is still multiplied, and must be finite
        zeros = partial(torch.zeros, dtype=shape.dtype, device=shape.device)
        self.keys_RHTE = [zeros(0, at.num_heads, width, at.key_width) for at in shape.layers]
        self.values_RHTE = [zeros(0, at.num_heads, width, at.value_width) for at in shape.layers]

    @property
    def num_places(self) -> int:
        return len(self.keys_RHTE[0])

    def resize(self, num_places: int) -> None:
        """Change the number of places.

        Raises:
            torch.OutOfMemoryError: all sequences are intact then, and all blocks of one size.
        """
        kept = len(self.ids)
        try:
            for layers in (self.keys_RHTE, self.values_RHTE):
                for i, before in enumerate(layers):  # one by one, so that little is there twice
                    grown = before.new_zeros(num_places, *before.shape[1:])
                    grown[:kept] = before[:kept]
                    layers[i] = grown
        finally:
            least = min(map(len, self.list_blocks()))
            for layers in (self.keys_RHTE, self.values_RHTE):
                layers[:] = [block[:least] for block in layers]

    def list_blocks(self) -> Sequence[Tensor]:
        return (*self.keys_RHTE, *self.values_RHTE)


class KvCache:
    """The keys and values of each sequence, and its states, by request id.

    Invariant: the buckets together have places for at most `capacity` tokens.
    """

    def __init__(self, shape: KvShape, capacity: int) -> None:
        self.shape, self.capacity = shape, capacity
        self.buckets: dict[int, KvBucket] = {}
        """By width."""
        self.states: dict[str, States] = {}
        """Those of the sequences that have begun."""
        self._widths: dict[str, int] = {}

    def __contains__(self, id: str) -> bool:
        return id in self._widths

    @property
    def held(self) -> int:
        """Tokens that the sequences have places for."""
        return sum(self._widths.values())

    @property
    def longest(self) -> int:
        """The most tokens of a sequence: of the buckets that there is room for."""
        return 1 << (self.capacity.bit_length() - 1)

    @staticmethod
    def compute_room(length: int) -> int:
        """Return the tokens that a sequence of this length takes."""
        return choose_bucket_width(length)

    def locate(self, id: str) -> tuple[KvBucket, int]:
        """Return a sequence's bucket and its place there."""
        bucket = self.buckets[self._widths[id]]
        return bucket, bucket.ids.index(id)

    def reserve(self, id: str, length: int) -> None:
        """Give a sequence, new or not, a place for `length` tokens; the caller keeps to `capacity`.

        Raises:
            torch.OutOfMemoryError: the device has no memory for it; every sequence keeps its place.
        """
        width, before = choose_bucket_width(length), self._widths.get(id)
        if before is not None and before >= width:
            return
        bucket = self.buckets.setdefault(width, KvBucket(self.shape, width))
        if len(bucket.ids) == bucket.num_places:
            self._extend(bucket)
        place = len(bucket.ids)
        if before is not None:
            old, old_place = self.locate(id)
            for target, source in zip(bucket.list_blocks(), old.list_blocks(), strict=True):
                target[place, :, :before] = source[old_place]
            self._leave_bucket(id)
        bucket.ids.append(id)
        self._widths[id] = width

    def remove(self, id: str) -> None:
        self._leave_bucket(id)
        self.states.pop(id, None)

    def read(self, id: str, start: int, stop: int) -> Tensor:
        """Copy a span of a sequence's keys and values [t, F]."""
        bucket, place = self.locate(id)
        return torch.cat([block[place, :, start:stop].transpose(0, 1).flatten(1) for block in bucket.list_blocks()], 1)

    def write(self, id: str, start: int, values_tF: Tensor) -> None:
        """Write what `read` returned, from `start`."""
        bucket, place = self.locate(id)
        blocks = bucket.list_blocks()
        spans = values_tF.split([block.shape[1] * block.shape[3] for block in blocks], 1)
        for block, span in zip(blocks, spans, strict=True):
            block[place, :, start : start + len(span)] = span.unflatten(1, block.shape[1::2]).transpose(0, 1)

    def _leave_bucket(self, id: str) -> None:
        """Free a sequence's place, which the bucket's last one takes."""
        bucket, place = self.locate(id)
        last = len(bucket.ids) - 1
        if place != last:
            for block in bucket.list_blocks():
                block[place] = block[last]
            bucket.ids[place] = bucket.ids[last]
        bucket.ids.pop()
        del self._widths[id]

    def _extend(self, bucket: KvBucket) -> None:
        """Double the places, or add as many as the budget allows once other buckets have given up unused ones."""
        wanted = max(4, 2 * bucket.num_places)
        if self._count_allocated() + (wanted - bucket.num_places) * bucket.width > self.capacity:
            self._drop_unused(bucket)
            spare = (self.capacity - self._count_allocated()) // bucket.width
            wanted = min(wanted, bucket.num_places + max(1, spare))
        try:
            bucket.resize(wanted)
        except torch.OutOfMemoryError:
            self._drop_unused(bucket)
            bucket.resize(bucket.num_places + 1)

    def _drop_unused(self, but: KvBucket) -> None:
        for width, other in list(self.buckets.items()):
            if other is not but and not other.ids:
                del self.buckets[width]
            elif other is not but:
                other.resize(len(other.ids))

    def _count_allocated(self) -> int:
        return sum(bucket.num_places * width for width, bucket in self.buckets.items())
