"""Turns texts into token ids, for training and for serving alike.

A special token that a user wrote is text: `Encoder.mark` distinguishes it from those that a chat template writes.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase


class Encoder:
    """Encodes texts that begin a row and texts that follow others.

    Args:
        split_special_tokens: whether `mark` keeps special tokens as text; if False, `mark` changes nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        tokenizer("a")  # resets truncation and padding, which a tokenizer.json may have set
        added = tokenizer.added_tokens_decoder
        self.special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        """The ids of special tokens."""
        words = {token.content for i, token in added.items() if i in self.special and not token.single_word}
        self._words = sorted(word for word in words if word.strip())
        self._number = {word: i for i, word in enumerate(self._words)}
        self._pattern = re.compile(_build_alternation(self._words)) if split_special_tokens and self._words else None
        # random, so that no text can hold one on purpose
        self._mark, self._alias = (f"\ue000{secrets.token_hex(8)}" for _ in range(2))
        self._marks = re.compile(f"{self._mark}([0-9]+)\ue001")
        first = tokenizer.convert_ids_to_tokens(self.encode(["a"])[0][:1])
        self._adds_space = first[0].startswith(("▁", "Ġ"))
        bos = tokenizer.bos_token_id
        self.bos: list[int] = [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []
        """The id of the token that this tokenizer puts before every text; empty if there is none."""

    def mark(self, value: Any) -> Any:
        """Replace each special token by a mark, in a text or in all texts of a list or mapping."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self._pattern.sub(lambda found: f"{self._mark}{self._number[found[0]]}\ue001", value)
        if isinstance(value, dict):
            return {key: self.mark(each) for key, each in value.items()}
        return [self.mark(each) for each in value] if isinstance(value, list) else value

    def unmark(self, text: str) -> str:
        """Return the text as it was before `mark`."""
        return self._marks.sub(lambda found: self._words[int(found[1])], text) if self._mark in text else text

    def is_marked(self, text: str) -> bool:
        """Return whether `mark` replaced a special token in the text."""
        return self._mark in text

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts that begin a row.

        Raises:
            ValueError: the tokenizer can't distinguish a special token from the same letters as text.
        """
        if not texts:
            return []
        if marked := [text for text in texts if self._mark in text]:
            own = iter([self._encode_marked(text) for text in marked])
            rest = iter(self.encode([text for text in texts if self._mark not in text]))
            return [next(own if self._mark in text else rest) for text in texts]
        if self._tokenizer.is_fast:
            # computes no offsets, which take most of the time, and lets other threads run, which `encode` does not
            backend = self._tokenizer.backend_tokenizer
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        ids: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return ids

    def encode_rest(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts that follow others, tokenised apart from them."""
        if not self._adds_space:
            return self.encode(texts)
        # this tokenizer adds a space before any text, which is wrong inside a row: encode after a line break and cut
        (anchor,) = self.encode(["\n"])
        after_anchor = self.encode([f"\n{text}" for text in texts])
        return [
            ids[len(anchor) :] if ids[: len(anchor)] == anchor else self.encode([text])[0]
            for ids, text in zip(after_anchor, texts, strict=True)
        ]

    def _encode_marked(self, text: str) -> list[int]:
        """Encode in one call, with the template's special tokens under aliases that only `_blind` knows."""
        assert self._pattern is not None
        if not self._tokenizer.is_fast:
            return self._encode_apart(text)
        blind, ids_of, renamed = self._blind
        named = self._pattern.sub(lambda found: self._assign_alias(found[0]), text)
        (encoding,) = blind.encode_batch_fast([self.unmark(named)], add_special_tokens=False)
        there = encoding.ids
        if taken := {ids_of.get(token, token) for token in {*there} - renamed} & self.special:
            word = self._tokenizer.convert_ids_to_tokens(taken.pop())
            raise ValueError(f"the tokenizer reads {word!r} in a text as its special token")
        return [ids_of.get(token, token) for token in there]

    def _encode_apart(self, text: str) -> list[int]:
        """Encode a text and each special token in it separately, for tokenizers written in Python."""
        ids: list[int] = []
        for i, part in enumerate(self._marks.split(text)):
            if i % 2:
                word = self._words[int(part)]
                ids += self._tokenizer.encode(word, add_special_tokens=False, split_special_tokens=True)
            elif part:
                ids += (self.encode_rest if ids else self.encode)([part])[0]
        return ids

    def _assign_alias(self, word: str) -> str:
        return f"{self._alias}{self._number[word]}\ue001"

    @cached_property
    def _blind(self) -> tuple[Tokenizer, dict[int, int], frozenset[int]]:
        """The tokenizer with its special tokens renamed, so that their original names are plain text.

        With it come a table from each added token's id in it to the id here, because tokens outside the vocabulary get
        new numbers, and the ids in it of the renamed tokens.
        """
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        state["post_processor"] = state["truncation"] = state["padding"] = None
        here = {token["content"]: int(token["id"]) for token in state["added_tokens"]}
        for token in state["added_tokens"]:
            if token["content"] in self._number:
                token["content"] = self._assign_alias(token["content"])
        blind = Tokenizer.from_str(json.dumps(state))
        names = {word: self._assign_alias(word) if word in self._number else word for word in here}
        there = {word: int(blind.token_to_id(name) or 0) for word, name in names.items()}
        return blind, {there[word]: here[word] for word in here}, frozenset(there[word] for word in self._words)


def _build_alternation(words: Iterable[str]) -> str:
    """Return a regular expression that matches the longest of these words and reads each letter only once."""
    words = set(words)
    tails: dict[str, set[str]] = {}
    for word in words - {""}:
        tails.setdefault(word[0], set()).add(word[1:])
    if not tails:
        return ""
    branches = "|".join(re.escape(head) + _build_alternation(tail) for head, tail in sorted(tails.items()))
    return f"(?:{branches})?" if "" in words else f"(?:{branches})"
