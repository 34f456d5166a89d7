"""From a row of a source to tokens with loss weights.

Every format becomes messages, and messages become text through the tokenizer's chat template, or through the plain
template: contents on lines of their own, the end token after each completion. The prompt and the completion are
tokenised apart from each other, so that generation starts from the very token ids that training saw.

Not here: where rows come from (sources.py), and what is done with the result (load.py).
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from rankloom.config.data import DataConfig
from rankloom.data.encode import Encoder
from rankloom.errors import ConfigError, DataError

OK, TRUNCATED, EMPTY, OVER_LONG = range(4)
"""What became of a source's row: the last two are dropped."""
PREVIEW_LENGTH = 80

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """One row, ready to train on; nothing is padded."""

    input_ids: list[int]
    loss_weights: list[float]
    """Each token's weight in the loss, as the token that is predicted; the first is never predicted."""
    prompt_length: int
    """Tokens before the (last) completion."""
    completion: str
    """The completion's text without what ends the turn; in classification the label."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text that is tokenised by itself."""

    text: str
    trained: bool
    ended: bool = False
    """Whether the end token has to follow."""


@dataclass(frozen=True)
class Conversation:
    """A row's text: what precedes the completion, and the completion."""

    pieces: list[Piece]
    completion: str
    """As given, without what the template adds."""
    preview: str
    skipped_turns: int = 0
    """Earlier assistant turns without loss, since the template renders them differently once they are history."""

    @property
    def prompt(self) -> str:
        return "".join(piece.text for piece in self.pieces[:-1])


class Renderer:
    """Renders batches of a source's rows; `__call__` is what `Dataset.map` runs.

    Args:
        format: one of `COLUMNS`, not auto.
        label_names: the names of integer labels, where the source knows them.
        labels: in classification, the labels that are known; `label_table` makes them.
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
        self.tokenizer, self.config, self.format, self.field = tokenizer, config, format, field
        self.label_names, self.labels = label_names, labels
        self.chat = uses_chat_template(config, tokenizer, format)
        self.converse: Callable[[dict[str, Any], str], Conversation | None] = {
            "chat": self._from_chat,
            "instruction": lambda row, name: self._from_pair(row, name, "instruction", "response"),
            "completion": lambda row, name: self._from_pair(row, name, "prompt", "completion"),
            "classification": self._from_labelled,
            "text": self._from_text,
        }[format]
        self.end_id: int = tokenizer.eos_token_id
        self.special = set(tokenizer.all_special_ids)
        self.special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.encoder = Encoder(tokenizer)
        self.takes_system = self.chat and takes_system(tokenizer)

    def __call__(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        names = [f"{self.field}: row {i + 1}" for i in indices]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        found = [self.converse(row, name) for row, name in zip(rows, names, strict=True)]
        starts = iter(self.encoder.encode([c.pieces[0].text for c in found if c]))
        rest = iter(self.encoder.encode_rest([piece.text for c in found if c for piece in c.pieces[1:]]))
        result: dict[str, list[Any]] = {name: [] for name in OUTPUT}
        for conversation, name, index in zip(found, names, indices, strict=True):
            if conversation is None:
                _append(result, source_row=index, status=EMPTY)
                continue
            tokens = [next(starts), *(next(rest) for _ in conversation.pieces[1:])]
            for row in self._rows(conversation, tokens, name):
                _append(result, source_row=index, **row)
        return result

    def label_table(self, values: Sequence[Any]) -> dict[str, list[int]]:
        """Each label's completion, as token ids with the end of the turn; sorted by label.

        Raises:
            DataError: two labels are the same tokens, or one begins another, so that they can't be told apart.
        """
        labels = sorted({label for value in values if (label := self._label(value, self.field)).strip()})
        conversations = [self._render([_message("user", "a"), _message("assistant", label)], label) for label in labels]
        table: dict[str, list[int]] = {}
        for conversation, ids in zip(
            conversations, self.encoder.encode_rest([c.pieces[-1].text for c in conversations]), strict=True
        ):
            table[conversation.completion] = self._ended(conversation.pieces[-1], ids)
        # sorted, tokens that begin others come right before one of those
        by_tokens = sorted(table.items(), key=lambda item: item[1])
        for (one, ids), (other, other_ids) in pairwise(by_tokens):
            if other_ids[: len(ids)] == ids:
                raise DataError(f"{self.field}: the labels {one!r} and {other!r} become the same tokens; rename one")
        return table

    def _from_pair(self, row: dict[str, Any], name: str, asked: str, answered: str) -> Conversation | None:
        prompt, completion = self._text(row[asked], name, asked), self._text(row[answered], name, answered)
        if not prompt.strip() or not completion.strip():
            return None
        return self._render([_message("user", prompt), _message("assistant", completion)], name)

    def _from_labelled(self, row: dict[str, Any], name: str) -> Conversation | None:
        text, label = self._text(row["text"], name, "text"), self._label(row["label"], name)
        if not text.strip() or not label.strip():
            return None
        return self._render([_message("user", text), _message("assistant", label)], name)

    def _from_text(self, row: dict[str, Any], name: str) -> Conversation | None:
        text = self._text(row["text"], name, "text")
        if not text.strip():
            return None
        return Conversation([Piece(text, trained=True, ended=True)], text, _preview(text))

    def _from_chat(self, row: dict[str, Any], name: str) -> Conversation | None:
        given = row["messages"]
        if given is None:
            return None
        if not isinstance(given, list) or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in given):
            raise DataError(
                f"{name}: messages must be a list of {{role: ..., content: ...}}, found {str(given)[:80]!r}"
            )
        messages = [_message(str(m["role"]), self._text(m["content"], name, "messages.content")) for m in given]
        while messages and messages[-1]["role"] != "assistant":  # nothing is learnt from what no turn answers
            messages.pop()
        asked = any(m["role"] != "system" and m["content"].strip() for m in messages[:-1])
        if not messages or not asked or not messages[-1]["content"].strip():
            return None
        return self._render(messages, name)

    def _text(self, value: Any, name: str, column: str) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            if math.isnan(value):
                return ""
            value = int(value) if value.is_integer() else value  # an integer column with a hole in it is read as floats
        if not isinstance(value, (str, int, float)):
            raise DataError(
                f"{name}: {column} must be text, found {type(value).__name__} {str(value)[:60]!r} (in JSON, a text "
                f"that looks like a date is read as one; csv and parquet keep it as it is)"
            )
        return str(value)

    def _label(self, value: Any, name: str) -> str:
        if isinstance(value, int) and self.label_names is not None:
            return self.label_names[value] if 0 <= value < len(self.label_names) else ""  # -1: without a label
        return self._text(value, name, "label")

    def _render(self, messages: list[Message], name: str) -> Conversation:
        if self.config.instruction:
            messages = _instructed(messages, self.config.instruction)
        try:
            return self._render_chat(messages, name) if self.chat else self._render_plain(messages)
        except jinja2.TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise DataError(
                f"{name}: the tokenizer's chat template refuses the roles {roles}: {error}; try data.template=plain"
            ) from None

    def _render_plain(self, messages: list[Message]) -> Conversation:
        pieces: list[Piece] = []
        prompt = ""
        for message in messages:
            if message["role"] == "assistant" and (prompt or pieces):
                pieces += [Piece(prompt, trained=False), Piece(message["content"], trained=True, ended=True)]
                prompt = ""
            else:
                prompt += f"{message['content']}\n"
        return Conversation(pieces, messages[-1]["content"], _preview(messages[-2]["content"]))

    def _render_chat(self, messages: list[Message], name: str) -> Conversation:
        messages = messages if self.takes_system else system_in_user(messages)
        whole, pieces, skipped = self._template(messages), list[Piece](), 0
        done = 0  # characters of `whole` that are in `pieces`
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0]
        for i in turns[:-1]:
            before = self._template(messages[:i], ask=True)
            after = self._template(messages[: i + 1]).rstrip()
            if done <= len(before) < len(after) and whole.startswith(before) and whole.startswith(after):
                pieces += [Piece(whole[done : len(before)], trained=False), Piece(after[len(before) :], trained=True)]
                done = len(after)
            else:
                skipped += 1
        prompt = self._template(messages[:-1], ask=True)
        content = messages[-1]["content"]
        if not prompt.startswith(whole[:done]):  # the last turn's prompt rewrites history: only that turn is trained on
            pieces, done, skipped = [], 0, len(turns) - 1
        start = len(prompt) if whole.startswith(prompt) else whole.rfind(content.strip())
        if start < 0:
            raise DataError(f"{name}: the tokenizer's chat template drops the completion {content[:60]!r}")
        pieces.append(Piece(prompt[done:], trained=False))
        # a line break after the end of the turn is never generated
        pieces.append(Piece(whole[start:].rstrip(), trained=True, ended=True))
        return Conversation(pieces, content, _preview(messages[-2]["content"]), skipped)

    def _template(self, messages: list[Message], *, ask: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        return str(text)

    def _rows(self, conversation: Conversation, tokens: list[list[int]], name: str) -> list[dict[str, Any]]:
        """A conversation's row, or rows; `tokens` are its pieces'."""
        tokens = [self._ended(piece, ids) for piece, ids in zip(conversation.pieces, tokens, strict=True)]
        if not self.chat and tokens[0][: len(self.encoder.bos)] != self.encoder.bos:
            tokens = [self.encoder.bos, *tokens]
            pieces = [Piece("", trained=False), *conversation.pieces]
        else:
            pieces = conversation.pieces
        everything = self.config.train_on == "all"
        ids = [token for part in tokens for token in part]
        weights = [int(piece.trained or everything) for piece, part in zip(pieces, tokens, strict=True) for _ in part]
        weights[0] = 0
        text = conversation.completion if self.format == "text" else conversation.prompt
        common = {
            "completion": "" if self.format == "text" else conversation.completion,
            "prompt_digest": digest(text),
            "row_digest": digest(f"{conversation.prompt}\0{conversation.completion}"),
            "preview": conversation.preview,
            "skipped_turns": conversation.skipped_turns,
        }
        if self.format == "classification":
            self._check_label(conversation.completion, tokens[-1], name)
        if self.format == "text":
            return [{**common, **chunk} for chunk in self._chunks(ids, weights, len(ids) - len(tokens[-1]))]
        return [{**common, **self._fit(ids, weights, len(tokens[-1]), name)}]

    def _ended(self, piece: Piece, ids: list[int]) -> list[int]:
        if not piece.ended or (self.chat and ids and ids[-1] in self.special):
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

    def _fit(self, ids: list[int], weights: list[int], num_completion: int, name: str) -> dict[str, Any]:
        """Cut the start of the prompt where the row is too long."""
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

    def _chunks(self, ids: list[int], weights: list[int], prompt_length: int) -> list[dict[str, Any]]:
        """Cut a text into rows; each begins with the last token of the one before, so that every token is predicted."""
        limit = self.config.max_length
        chunks = []
        for i, start in enumerate(range(0, max(1, len(ids) - 1), limit - 1)):
            part = weights[start : start + limit]
            part[0] = 0
            before = 0 if i else prompt_length
            chunks.append({"chunk": i, "input_ids": ids[start : start + limit], "loss_weights": part})
            chunks[-1].update(prompt_length=before, status=OK)
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
    "chunk": int,
    "status": int,
    "source_row": int,
}
"""What a rendered row consists of, each with the maker of its blank."""


def _append(result: dict[str, list[Any]], **row: Any) -> None:
    for name, blank in OUTPUT.items():
        result[name].append(row[name] if name in row else blank())


def uses_chat_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase, format: str) -> bool:
    """Whether rows go through the chat template.

    Raises:
        DataError: a chat template is asked for, but there is none. ConfigError: the format has no use for it.
    """
    if format == "text":
        for name, value in (("template", config.template == "chat"), ("instruction", config.instruction)):
            if value:
                raise ConfigError(
                    f"data.{name}: {getattr(config, name)!r} means nothing for the format text; remove it"
                )
        return False
    has_template = tokenizer.chat_template is not None
    if config.template == "chat" and not has_template:
        raise DataError("data.template: chat, but the model's tokenizer has no chat template; use auto or plain")
    return has_template and config.template != "plain"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _instructed(messages: list[Message], instruction: str) -> list[Message]:
    if messages[0]["role"] == "system":
        return [_message("system", f"{instruction}\n\n{messages[0]['content']}"), *messages[1:]]
    return [_message("system", instruction), *messages]


def system_in_user(messages: list[Message]) -> list[Message]:
    """For templates without a system role."""
    if messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return messages
    merged = _message("user", f"{messages[0]['content']}\n\n{messages[1]['content']}")
    return [merged, *messages[2:]]


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Some templates refuse a system message, and some silently drop it."""
    mark = "a-system-message"
    try:
        text = tokenizer.apply_chat_template([_message("system", mark), _message("user", "a")], tokenize=False)
    except jinja2.TemplateError:
        return False
    return mark in str(text)


def _preview(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= PREVIEW_LENGTH else f"{line[: PREVIEW_LENGTH - 1]}…"
