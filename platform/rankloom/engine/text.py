"""From tokens to text, incrementally: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTEXT = 6
"""Tokens of the prompt that decoding begins with, so that a space between it and the completion shows."""
LONGEST = 16
"""Pushes of tokens that may wait for the rest of a character: more are bytes that are no text."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Decoder:
    """A tokenizer's tokens as text and as bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shown: Collection[int] = ()) -> None:
        """
        Args:
            shown: special tokens that texts show.
        """
        self._tokenizer = tokenizer
        self._skips = True
        known = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        self._special = frozenset(token for token in known if not self.decode([token])) - frozenset(shown)
        self._skips = not shown  # the special tokens that are not shown are not decoded
        self._bytes = {character: byte for byte, character in bytes_to_unicode().items()}
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._known: dict[tuple[int, bool], bytes] = {}

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skips))

    def get_name(self, token: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def is_special(self, token: int) -> bool:
        """Return whether texts do not show this token."""
        return token in self._special

    def get_piece(self, token: int, *, at_start: bool = False) -> bytes:
        """Return the bytes that a token adds to a text: of a character that is split over tokens, its part.

        Args:
            at_start: nothing precedes it; many tokenizers omit a word's space there.
        """
        if (token, at_start) not in self._known:
            self._known[token, at_start] = self._find_piece(token, [] if at_start else self._anchor)
        return self._known[token, at_start]

    def _find_piece(self, token: int, before: list[int]) -> bytes:
        text = self.decode([*before, token])[len(self.decode(before)) :]
        if UNFINISHED not in text:
            return text.encode()
        name = self.get_name(token)
        if name.startswith("<0x") and name.endswith(">"):  # SentencePiece's bytes
            return bytes([int(name[3:-1], 16)])
        if all(character in self._bytes for character in name):  # byte-level BPE's
            return bytes(self._bytes[character] for character in name)
        return text.encode()


class Stops:
    """Stop strings as one automaton (Aho and Corasick's): a step a character, however many and long they are."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]
        """By state: how many of the last characters may be the beginning of a stop string."""
        self.reached = [0]
        """By state: the length of the longest stop string that ends there; 0: none does."""
        for stop in stops:
            state = 0
            for depth, letter in enumerate(stop, 1):
                if letter not in self._next[state]:
                    self._next[state][letter] = len(self._next)
                    self._next.append({})
                    self.depth.append(depth)
                    self.reached.append(0)
                state = self._next[state][letter]
            self.reached[state] = len(stop)
        self._shorter = [0] * len(self._next)
        order = list(self._next[0].values())
        for state in order:  # breadth first: what is shorter is known before
            for letter, longer in self._next[state].items():
                self._shorter[longer] = self.step(self._shorter[state], letter)
                self.reached[longer] = max(self.reached[longer], self.reached[self._shorter[longer]])
                order.append(longer)

    def step(self, state: int, letter: str) -> int:
        """Return the state after one more character; 0 is the first state."""
        while letter not in self._next[state]:
            if not state:
                return 0
            state = self._shorter[state]
        return self._next[state][letter]


NO_STOPS = Stops(())


class TextStream:
    """One completion's text as its tokens come."""

    def __init__(self, decoder: Decoder, prompt: Sequence[int], stops: Stops = NO_STOPS) -> None:
        self._decoder, self._stops = decoder, stops
        self._ids = [token for token in prompt[-CONTEXT:] if not decoder.is_special(token)]
        self._start, self._done = 0, len(self._ids)
        """Tokens from `_start` are decoded together; the text of those up to `_done` is certain."""
        self._before = decoder.decode(self._ids)
        """The text from `_start` to `_done`."""
        self._state, self._held = 0, ""
        self.grown = ""
        """What the tokens since the last whole character add."""
        self.is_whole = True
        """Whether it ends with a whole character."""
        self.stopped = False
        """Whether a stop string was reached, which ends the text."""
        self._num_waiting = 0
        """Pushes since the last whole character."""

    @property
    def at_start(self) -> bool:
        """Whether nothing precedes the next token."""
        return self.is_whole and not self._before

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens, and return the text that has become certain."""
        self._ids += [token for token in tokens if not self._decoder.is_special(token)]
        self.grown = self._decoder.decode(self._ids[self._start :])[len(self._before) :]
        self._num_waiting += 1
        self.is_whole = self._ends_whole()
        return self._settle() if self.is_whole else ""

    def finish(self) -> str:
        """Return the text that was held back."""
        text = "" if self.is_whole or self.stopped else self._settle()
        self.is_whole = True
        rest, self._held = self._held, ""
        return text + rest

    def _ends_whole(self) -> bool:
        if not self.grown.endswith(UNFINISHED) or self._num_waiting >= LONGEST:
            return True
        new, at_start = self._ids[self._done :], not self._before
        pieces = [self._decoder.get_piece(token, at_start=at_start and not at) for at, token in enumerate(new)]
        return b"".join(pieces) == self.grown.encode()  # that character itself, not a half of another

    def _settle(self) -> str:
        self._num_waiting = 0
        if self._done < len(self._ids):
            self._start, self._done = self._done, len(self._ids)
            self._before = self._decoder.decode(self._ids[self._start :])
        return self._take_certain(self.grown)

    def _take_certain(self, new: str) -> str:
        text = self._held + new
        for at, letter in enumerate(new, len(self._held) + 1):
            self._state = self._stops.step(self._state, letter)
            if self._stops.reached[self._state]:
                self.stopped, self._held = True, ""
                return text[: at - self._stops.reached[self._state]]
        certain = len(text) - self._stops.depth[self._state]
        self._held = text[certain:]
        return text[:certain]
