"""The data check: counts what the rows hold and what is wrong with them, and words the warnings.

It reads the columns that rendering writes beside the tokens (`render.OUTPUT`). A problem that makes training pointless
is an error, raised here or while rendering; a problem that only makes it worse is a warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from rankloom.config.data import DataConfig
from rankloom.data.render import EMPTY, OVER_LONG, TRUNCATED
from rankloom.data.rows import measure_lists
from rankloom.errors import DataError

NUM_EXAMPLES = 3


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class SplitReport(_Frozen):
    """Counts of one split's rows."""

    rows: int
    tokens: int
    trained_tokens: int
    """Tokens that carry loss."""
    median_length: float
    p95_length: float
    max_length: int
    empty: int
    """Rows dropped for lack of a prompt or a completion. Rows split off `train` are counted in `train`."""
    over_long: int
    """Rows dropped because the completion alone does not fit."""
    truncated: int
    """Rows that lost the start of their prompt."""
    chunks: int
    """Rows that are parts of longer texts."""
    duplicates: int
    """Rows with the prompt and the completion of an earlier row."""
    conflicts: int
    """Rows whose prompt has a different completion in another row."""
    skipped_turns: int
    """Earlier assistant turns that carry no loss, because the chat template rewrites history."""
    notes: dict[str, int]
    """What is not trained as given -> number of rows."""
    labels: dict[str, int] | None
    """Label -> number of rows; None unless the format is classification."""


class Overlap(_Frozen):
    """Prompts that `train` shares with another split."""

    rows: int
    """Rows of the other split."""
    examples: list[str]


class DataReport(_Frozen):
    """Counts of all splits, and the warnings."""

    format: str
    splits: dict[str, SplitReport]
    overlaps: dict[str, Overlap]
    """Other split -> prompts that it shares with train."""
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Part:
    """A selection of the rows of a rendered source."""

    rendered: datasets.Dataset
    field: str
    kept: np.ndarray
    """Indices of the selected rows."""
    empty: int
    over_long: int
    unread: tuple[str, ...] = ()
    """Columns of the source that the format does not read."""

    def get_column(self, name: str) -> pa.ChunkedArray:
        return self.rendered.data.column(name).take(pa.array(self.kept))

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return int(pc.sum(pc.list_flatten(self.get_column("loss_weights"))).as_py() or 0)

    def pick(self, kept: np.ndarray) -> Part:
        """Return a smaller selection; dropped rows stay counted in the whole."""
        return replace(self, kept=kept, empty=0, over_long=0, unread=())

    def describe(self, limit: int) -> str:
        """Return the numbers of dropped rows, in words."""
        return (
            f"{self.empty} without a prompt or a completion, {self.over_long} whose completion does not fit in "
            f"data.max_length={limit}"
        )


def gather(rendered: datasets.Dataset, field: str, unread: Sequence[str] = ()) -> Part:
    """Select the rows that were not dropped; there may be none."""
    status = rendered.data.column("status").to_numpy()
    empty, over_long = int((status == EMPTY).sum()), int((status == OVER_LONG).sum())
    kept = np.flatnonzero((status != EMPTY) & (status != OVER_LONG))
    return Part(rendered, field, kept, empty, over_long, tuple(unread))


def check_usable(part: Part, config: DataConfig) -> None:
    """Raise DataError if a source would train nothing.

    Raises:
        DataError: all rows were dropped, or no row has a token that carries loss.
    """
    if not len(part.kept):
        raise DataError(
            f"{part.field}: none of its {len(part.rendered)} rows can be used: {part.describe(config.max_length)}"
        )
    if not part.trained_tokens:
        raise DataError(
            f"{part.field}: no token of its {len(part.kept)} rows would be trained on; look at the rows, data.format "
            f"and data.train_on={config.train_on}"
        )


def build_report(parts: Mapping[str, Part], format: str, labels: Mapping[str, Any] | None, limit: int) -> DataReport:
    """Count the rows of all splits and word the warnings.

    Args:
        labels: label -> the token ids of its completion; None unless the format is classification.
        limit: `data.max_length`, which the warnings name.
    """
    splits = {name: _split_report(part, labels is not None and name != "retention") for name, part in parts.items()}
    overlaps = {name: _find_overlap(parts["train"], parts[name]) for name in ("validation", "test")}
    warnings = [line for name, split in splits.items() for line in _split_warnings(name, split, limit)]
    for name, part in parts.items():
        if part.unread:
            warnings.append(f"{name}: {len(part.unread)} column(s) are not read: {', '.join(map(repr, part.unread))}")
    for name, overlap in overlaps.items():
        if overlap.rows:
            shown = "; ".join(map(repr, overlap.examples))
            warnings.append(
                f"{name}: {overlap.rows} of {splits[name].rows} rows have a prompt that is also in train, which "
                f"makes the scores too good: {shown}"
            )
    trained = splits["train"].labels or {}
    if labels is not None and len(labels) == 1:
        warnings.append(f"all rows have the label {next(iter(labels))!r}: there is nothing to distinguish")
    for alike in _group_alike(labels or {}):
        shown = ", ".join(map(repr, alike))
        warnings.append(f"the labels {shown} differ only in capitals or spaces, and count as different classes")
    if absent := [label for label in labels or {} if label not in trained]:
        shown = ", ".join(map(repr, absent[:NUM_EXAMPLES]))
        warnings.append(f"train: {len(absent)} label(s) have no row to train on: {shown}")
    return DataReport(format=format, splits=splits, overlaps=overlaps, warnings=warnings)


def _split_report(part: Part, labelled: bool) -> SplitReport:
    lengths = measure_lists(part.rendered, "input_ids")[part.kept]
    chunk, whole_rows = part.get_column("chunk").to_numpy(), part.get_column("row_digest").to_pylist()
    prompts = part.get_column("prompt_digest").to_pylist()
    continued = np.append(chunk[1:] > 0, False)  # a chunk is followed by the rest of its text
    first = np.flatnonzero(chunk == 0)
    seen = Counter(whole_rows[i] for i in first)
    completions: dict[str, set[str]] = {}
    for i in first:
        completions.setdefault(prompts[i], set()).add(whole_rows[i])
    return SplitReport(
        rows=len(lengths),
        tokens=int(lengths.sum()),
        trained_tokens=part.trained_tokens,
        median_length=float(np.median(lengths)),
        p95_length=float(np.percentile(lengths, 95)),
        max_length=int(lengths.max()),
        empty=part.empty,
        over_long=part.over_long,
        truncated=int((part.get_column("status").to_numpy() == TRUNCATED).sum()),
        chunks=int(((chunk > 0) | continued).sum()),
        duplicates=sum(count - 1 for count in seen.values()),
        conflicts=sum(len(completions[prompts[i]]) > 1 for i in first),
        skipped_turns=int(part.get_column("skipped_turns").to_numpy().sum()),
        notes=dict(Counter(note for each in part.get_column("notes").to_pylist() for note in each.splitlines())),
        labels=dict(sorted(Counter(part.get_column("completion").to_pylist()).items())) if labelled else None,
    )


def _split_warnings(name: str, split: SplitReport, limit: int) -> list[str]:
    counts = {
        "dropped: no prompt or no completion": split.empty,
        f"dropped: the completion does not fit in data.max_length={limit}": split.over_long,
        f"lost the start of the prompt to data.max_length={limit}": split.truncated,
        "repeat an earlier row word for word": split.duplicates,
        "have a prompt that another row completes differently": split.conflicts,
        **split.notes,
    }
    lines = [f"{name}: {count} row(s) {what}" for what, count in counts.items() if count]
    if split.skipped_turns:
        lines.append(
            f"{name}: {split.skipped_turns} earlier assistant turn(s) carry no loss: the template rewrites them"
        )
    return lines


def _group_alike(labels: Mapping[str, Any]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault("".join(label.split()).casefold(), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def _find_overlap(train: Part, other: Part) -> Overlap:
    known = set(train.get_column("prompt_digest").to_pylist())
    shared = [i for i, prompt in enumerate(other.get_column("prompt_digest").to_pylist()) if prompt in known]
    previews = other.get_column("preview").take(pa.array(shared[:NUM_EXAMPLES], pa.int64())).to_pylist()
    return Overlap(rows=len(shared), examples=previews)
