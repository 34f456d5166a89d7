"""From tokens to text, bit by bit: never half a character, never a piece of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTEXT = 6
"""Tokens of the prompt that decoding begins with, so that a space between it and the completion shows."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """One completion's text as its tokens come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt[-CONTEXT:])
        self._start, self._done = 0, len(self._ids)
        """Tokens from `_start` are decoded together; the text of those up to `_done` is out."""
        self._held = ""
        self.stopped = False
        """Whether a stop string was reached; nothing comes after."""

    def push(self, token: int) -> str:
        """The text that is certain with this token."""
        self._ids.append(token)
        text = self._decoded_since()
        if text.endswith(UNFINISHED):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return self._certain(text)

    def finish(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        text = self._certain(self._decoded_since())
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _decoded_since(self) -> str:
        before, now = self._decode(self._ids[self._start : self._done]), self._decode(self._ids[self._start :])
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _certain(self, text: str) -> str:
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class Pieces:
    """What each token contributes to a text, as bytes: of a character that is split over tokens, its part."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._bytes = {character: byte for byte, character in bytes_to_unicode().items()}

        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._found(token)
        return self._known[token]

    def _found(self, token: int) -> bytes:
        text = str(self._tokenizer.decode([token]))
        if UNFINISHED not in text:
            return text.encode()
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if name.startswith("<0x") and name.endswith(">"):  # SentencePiece's bytes
            return bytes([int(name[3:-1], 16)])
        if all(character in self._bytes for character in name):  # byte-level BPE's
            return bytes(self._bytes[character] for character in name)
        return text.encode()
