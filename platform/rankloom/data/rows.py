"""Tokenised rows on disk: one memory-mapped Arrow file per split, whose pages the workers share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rankloom.data.render import Row

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "loss_weights": datasets.List(datasets.Value("int8")),
        "prompt_length": datasets.Value("int32"),
        "completion": datasets.Value("large_string"),
    }
)
"""Columns of a rendered row that are stored."""


class Rows(Sequence[Row]):
    """The rows of one split, read from disk on access."""

    def __init__(self, dataset: datasets.Dataset, lengths: np.ndarray) -> None:
        self._dataset = dataset
        self.lengths = lengths
        """Number of tokens of each row, int64 [rows]."""
        self._digest: str | None = None

    @classmethod
    def open(cls, folder: Path) -> Rows:
        """Map the rows that `store` wrote."""
        dataset = datasets.load_from_disk(str(folder))
        return cls(dataset, measure_lists(dataset, "input_ids"))

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return self._pick(np.arange(len(self))[index])
        row = self._dataset[int(index)]
        return Row(row["input_ids"], list(map(float, row["loss_weights"])), row["prompt_length"], row["completion"])

    @property
    def largest_token(self) -> int:
        """The largest token id of the file."""
        chunks = self._dataset.data.column("input_ids").chunks
        return max((pc.max(pc.list_flatten(chunk)).as_py() or 0 for chunk in chunks), default=0)

    def select(self, num_rows: int, seed: int | None = None) -> Rows:
        """Return at most `num_rows` rows in their order: spread evenly, or with a seed chosen at random."""
        if num_rows >= len(self):
            return self
        if seed is None:  # the first rows of a file that is sorted by label would all be alike
            return self._pick(np.arange(num_rows) * len(self) // num_rows)
        chosen = np.random.default_rng(seed).permutation(len(self))[:num_rows]
        return self._pick(np.sort(chosen))

    def digest(self) -> str:
        """Return a hash of the rows' contents, equal on every machine."""
        if self._digest is None:
            self._digest = self._hash()
        return self._digest

    def _hash(self) -> str:
        assert self._dataset._indices is None, "only whole splits have a digest"
        table = self._dataset.data.table
        whole = hashlib.sha256()
        for name in FEATURES:
            part = hashlib.sha256()  # one per column: the cut into record batches must not matter
            sizes = hashlib.sha256()
            for chunk in table.column(name).chunks:
                if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
                    sizes.update(pc.list_value_length(chunk).cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
                    part.update(pc.list_flatten(chunk).to_numpy(zero_copy_only=False).tobytes())
                elif pa.types.is_integer(chunk.type):
                    part.update(chunk.to_numpy(zero_copy_only=False).tobytes())
                else:
                    sizes.update(pc.binary_length(chunk).cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
                    part.update("".join(chunk.to_pylist()).encode("utf-8"))
            whole.update(sizes.digest() + part.digest())
        return whole.hexdigest()

    def _pick(self, indices: np.ndarray) -> Rows:
        return Rows(self._dataset.select(indices), self.lengths[indices])


def store(rendered: datasets.Dataset, indices: np.ndarray, folder: Path) -> Rows:
    """Write the chosen rows to one Arrow file and map it."""
    kept = rendered.select_columns(list(FEATURES)).select(indices)
    kept.save_to_disk(str(folder), num_shards=1)
    return Rows.open(folder)


def measure_lists(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """Return the length of each list in a column, int64 [rows]."""
    lengths: np.ndarray = pc.list_value_length(dataset.data.column(column)).to_numpy().astype(np.int64)
    return lengths
