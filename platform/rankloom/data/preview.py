"""Preview: rows as the model sees them, cut where the loss weight of their tokens changes."""

from __future__ import annotations

from itertools import groupby

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from rankloom.data.render import Row
from rankloom.data.rows import Rows


class Segment(BaseModel):
    """Successive tokens of a row with the same loss weight, as text."""

    model_config = ConfigDict(frozen=True)

    text: str
    tokens: int
    weight: float
    """Weight of each token's prediction in the loss; 0: read, not trained."""


class RowPreview(BaseModel):
    """A row's text with special tokens, in segments that are trained and segments that are only read."""

    model_config = ConfigDict(frozen=True)

    row: int
    """Its place in the split, from 1."""
    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        """Number of its tokens."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def trained_tokens(self) -> int:
        """Number of its tokens that carry loss."""
        return sum(segment.tokens for segment in self.segments if segment.weight)


def preview_rows(rows: Rows, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> tuple[RowPreview, ...]:
    """Return at most `num_rows` rows, spread evenly over the split."""
    count = min(num_rows, len(rows))
    places = [number * len(rows) // count for number in range(count)]
    return tuple(RowPreview(row=place + 1, segments=_cut(rows[place], tokenizer)) for place in places)


def _cut(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[Segment, ...]:
    found, end, before = [], 0, ""
    for weight, group in groupby(row.loss_weights):
        start, end = end, end + len(list(group))
        # some tokenizers drop the space that begins a text, so a segment is decoded after what precedes it
        whole = tokenizer.decode(row.input_ids[:end], clean_up_tokenization_spaces=False)
        text = whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(row.input_ids[start:end])
        found.append(Segment(text=text, tokens=end - start, weight=weight))
        before = whole
    return tuple(found)
