"""Renders a row of a source as tokens with loss weights.

The prompt and the completion are tokenised apart from each other, so that generation starts from exactly the token ids
that training saw.

sources.py reads the rows, conversation.py makes text of them, load.py uses the result.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict

from transformers import PreTrainedTokenizerBase

from rankloom.config.data import DataConfig
from rankloom.data.conversation import Conversation, ConversationReader, Piece
from rankloom.data.messages import decode_cell
from rankloom.errors import DataError

OK, TRUNCATED, EMPTY, OVER_LONG = range(4)
"""Status of a source's row; EMPTY and OVER_LONG rows are dropped."""


@dataclass(frozen=True)
class Row:
    """One row, ready to train on, without padding."""

    input_ids: list[int]
    loss_weights: list[float]
    """Weight of each token's prediction in the loss, [tokens]; the first token is never predicted."""
    prompt_length: int
    """Number of tokens before the (last) completion."""
    completion: str
    """The completion's text without the end of the turn; in classification the label."""


class RenderedRow(TypedDict, total=False):
    """A row of `Renderer`'s result; where a key is missing, `OUTPUT` has the blank value."""

    input_ids: list[int]
    loss_weights: list[int]
    prompt_length: int
    completion: str
    prompt_digest: str
    row_digest: str
    preview: str
    skipped_turns: int
    notes: str
    chunk: int
    status: int


class Renderer:
    """Renders batches of a source's rows; `Dataset.map` runs `__call__`.

    Args:
        format: one of `COLUMNS`, not auto.
        label_names: the names of integer labels, if the source has them.
        labels: the known labels of classification; `build_label_table` makes them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        format: str,
        field: str,
        label_names: Sequence[str] | None = None,
        labels: dict[str, list[int]] | None = None,
    ) -> None:
        self.tokenizer, self.config, self.format, self.field, self.labels = tokenizer, config, format, field, labels
        self.reader = ConversationReader(tokenizer, config, format, label_names)
        self.encoder, self.chat = self.reader.encoder, self.reader.template is not None
        self.end_id: int = tokenizer.eos_token_id

    def __call__(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        names = [f"{self.field}: row {i + 1}" for i in indices]
        rows = [
            dict(zip(columns, map(decode_cell, values), strict=True)) for values in zip(*columns.values(), strict=True)
        ]
        conversations = [self.reader.read(row, name) for row, name in zip(rows, names, strict=True)]
        try:
            starts = iter(self.encoder.encode([c.pieces[0].text for c in conversations if c]))
            rest = iter(self.encoder.encode_rest([piece.text for c in conversations if c for piece in c.pieces[1:]]))
        except ValueError as error:
            raise DataError(f"{self.field}: {error}; set data.split_special_tokens=false, or remove it") from None
        result: dict[str, list[Any]] = {name: [] for name in OUTPUT}
        for conversation, name, index in zip(conversations, names, indices, strict=True):
            if conversation is None:
                _append(result, source_row=index, status=EMPTY)
                continue
            tokens = [next(starts), *(next(rest) for _ in conversation.pieces[1:])]
            for row in self._build_rows(conversation, tokens, name):
                _append(result, source_row=index, **row)
        return result

    def build_label_table(self, values: Sequence[Any]) -> dict[str, list[int]]:
        """Return each label's completion as token ids with the end of the turn, sorted by label.

        Raises:
            DataError: two labels are the same tokens, or one begins another, so that scoring can't distinguish them.
        """
        labels = sorted(
            {label for value in values if (label := self.reader.read_label(decode_cell(value), self.field)).strip()}
        )
        conversations = [self.reader.render_label(label) for label in labels]
        table: dict[str, list[int]] = {}
        for conversation, ids in zip(
            conversations, self.encoder.encode_rest([c.pieces[-1].text for c in conversations]), strict=True
        ):
            table[conversation.completion] = self._end(conversation.pieces[-1], ids)
        # once sorted, a prefix stands directly before a label that begins with it
        by_tokens = sorted(table.items(), key=lambda item: item[1])
        for (one, ids), (other, other_ids) in pairwise(by_tokens):
            if other_ids[: len(ids)] == ids:
                raise DataError(f"{self.field}: the labels {one!r} and {other!r} become the same tokens; rename one")
        return table

    def _build_rows(self, conversation: Conversation, tokens: list[list[int]], name: str) -> list[RenderedRow]:
        """Return a conversation's row, or rows.

        Args:
            tokens: token ids of each piece.
        """
        tokens = [self._end(piece, ids) for piece, ids in zip(conversation.pieces, tokens, strict=True)]
        if not self.chat and tokens[0][: len(self.encoder.bos)] != self.encoder.bos:
            tokens = [self.encoder.bos, *tokens]
            pieces = [Piece("", trained=False), *conversation.pieces]
        else:
            pieces = conversation.pieces
        everything = self.config.train_on == "all"
        ids = [token for part in tokens for token in part]
        weights = [
            int((piece.trained or everything) and not piece.muted)
            for piece, part in zip(pieces, tokens, strict=True)
            for _ in part
        ]
        weights[0] = 0
        prompt = self.encoder.unmark(conversation.prompt)
        common: RenderedRow = {
            "completion": "" if self.format == "text" else conversation.completion,
            "prompt_digest": hash_text(conversation.completion if self.format == "text" else prompt),
            "row_digest": hash_text(f"{prompt}\0{conversation.completion}"),
            "preview": conversation.preview,
            "skipped_turns": conversation.skipped_turns,
            "notes": "\n".join(conversation.notes),
        }
        if self.format == "classification":
            self._check_label(conversation.completion, tokens[-1], name)
        if self.format == "text":
            return [{**common, **chunk} for chunk in self._cut_chunks(ids, weights, len(ids) - len(tokens[-1]))]
        return [{**common, **self._fit(ids, weights, len(tokens[-1]), name)}]

    def _end(self, piece: Piece, ids: list[int]) -> list[int]:
        if not piece.ended or (self.chat and ids and ids[-1] in self.encoder.special):
            return ids
        return [*ids, self.end_id]

    def _check_label(self, label: str, ids: list[int], name: str) -> None:
        if self.labels is None:
            return
        if label not in self.labels:
            near = difflib.get_close_matches(label, self.labels, n=3)
            hint = f"; near it: {', '.join(map(repr, near))}" if near else ""
            raise DataError(f"{name}: the label {label!r} is none of the {len(self.labels)} labels of data.train{hint}")
        if self.labels[label] != ids:
            raise DataError(
                f"{name}: the chat template renders the label {label!r} differently from row to row, so that labels "
                f"can't be compared; use data.template=plain"
            )

    def _fit(self, ids: list[int], weights: list[int], num_completion: int, name: str) -> RenderedRow:
        """Cut the start of the prompt if the row is too long."""
        limit = self.config.max_length
        room = limit - num_completion
        prompt_length = len(ids) - num_completion
        if room < 1:
            if self.config.over_long == "error":
                raise DataError(
                    f"{name}: its completion of {num_completion} tokens does not fit beside a prompt in "
                    f"data.max_length={limit}; raise it, or set data.over_long=drop"
                )
            return {"status": OVER_LONG}
        if len(ids) <= limit:
            return {"status": OK, "input_ids": ids, "loss_weights": weights, "prompt_length": prompt_length}
        head = ids[:1] if room > 1 and ids[0] == self.tokenizer.bos_token_id else []  # models expect it first
        keep = limit - len(head)
        weights = [0] * len(head) + weights[-keep:]
        weights[0] = 0
        return {"status": TRUNCATED, "input_ids": head + ids[-keep:], "loss_weights": weights, "prompt_length": room}

    def _cut_chunks(self, ids: list[int], weights: list[int], prompt_length: int) -> list[RenderedRow]:
        """Cut a text into rows; each begins with the last token of the row before, so that every token is predicted."""
        limit = self.config.max_length
        chunks: list[RenderedRow] = []
        for i, start in enumerate(range(0, max(1, len(ids) - 1), limit - 1)):
            part = weights[start : start + limit]
            part[0] = 0
            before = 0 if i else prompt_length
            cut = ids[start : start + limit]
            chunks.append({"status": OK, "chunk": i, "input_ids": cut, "loss_weights": part, "prompt_length": before})
        return chunks


OUTPUT: dict[str, Callable[[], Any]] = {
    "input_ids": list,
    "loss_weights": list,
    "prompt_length": int,
    "completion": str,
    "prompt_digest": str,
    "row_digest": str,
    "preview": str,
    "skipped_turns": int,
    "notes": str,
    "chunk": int,
    "status": int,
    "source_row": int,
}
"""Columns of a rendered row -> maker of the blank value."""


def _append(result: dict[str, list[Any]], **row: Any) -> None:
    for name, blank in OUTPUT.items():
        result[name].append(row[name] if name in row else blank())


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
