"""Transcript: a completion's text as its tokens come, and their logprobs, each with what its token adds to the text.

A token's text depends on those around it: a word's space is left out at the start of a text, a character may be split
over tokens, a stop string takes the end of a token away. So logprobs wait until the text of their tokens is certain.
Their pieces, one after the other, are the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from rankloom.engine.protocol import Likelihood, SampledToken, TokenLogprobs
from rankloom.engine.text import Decoder, Stops, TextStream
from rankloom.engine.text_offset import TextOffset


class Transcript:
    """Invariant: what was given of `_placed` belongs to text that was given."""

    def __init__(self, decoder: Decoder, prompt: Sequence[int], stops: Stops, ends: frozenset[int]) -> None:
        """
        Args:
            ends: tokens that end the completion, and are not in its text.
        """
        self._decoder, self._ends = decoder, ends
        self._text = TextStream(decoder, prompt, stops)
        self._open: list[tuple[SampledToken, bool, int]] = []
        """Tokens since the last whole character; whether each is at the start; how much text was there before it."""
        self._placed: list[tuple[int, int, TokenLogprobs]] = []
        """From where to where in the text, in characters."""
        self._length = self._given = 0
        """Characters up to the last whole one, and those that were given."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was reached, which ends the text."""
        return self._text.stopped

    def push(self, tokens: Sequence[int], chosen: Sequence[SampledToken] = ()) -> str:
        """Add tokens, and return the text that has become certain.

        Args:
            chosen: how likely each was, where that is asked for.
        """
        text = ""
        for each in chosen:
            before = 0 if self._text.is_whole else len(self._text.grown)
            self._open.append((each, self._text.at_start, before))
            text += self._text.push(self._drop_ends([each.token]))
            if self._text.is_whole:
                self._place()
            if self.stopped:
                break
        if not chosen:
            text = self._text.push(self._drop_ends(tokens))
        self._given += len(text)
        return text

    def finish(self) -> str:
        """Return the text that was held back."""
        text = self._text.finish()
        self._place()
        self._given += len(text)
        return text

    def take_logprobs(self, *, last: bool = False) -> tuple[TokenLogprobs, ...]:
        """Return the logprobs whose text was returned since the last call.

        Args:
            last: the text has ended; a token that a stop string cut keeps what is left of it.
        """
        found = []
        while self._placed:
            start, end, entry = self._placed[0]
            if end > self._given and (self.stopped or not last):
                if not last or start >= self._given:
                    break
                kept = entry.chosen.piece.decode("utf-8", "replace")[: self._given - start].encode()
                entry = _replace_piece(entry, kept)
            self._placed.pop(0)
            found.append(entry)
        return tuple(found)

    def _drop_ends(self, tokens: Sequence[int]) -> list[int]:
        return [token for token in tokens if token not in self._ends]

    def _place(self) -> None:
        """Assign the text since the last whole character to its tokens."""
        if not self._open:
            return
        grown = self._text.grown
        pieces = [self._get_piece(each.token, at_start) for each, at_start, _ in self._open]
        if b"".join(pieces).decode("utf-8", "replace") == grown:
            place = TextOffset()
            spans = [place.take(piece) for piece in pieces]
        else:  # a decoder with rules of its own: as it showed them
            bounds = [min(before, len(grown)) for _, _, before in self._open] + [len(grown)]
            spans = list(pairwise(bounds))
            pieces = [grown[a:b].encode() for a, b in spans]
        for (each, at_start, _), piece, (start, end) in zip(self._open, pieces, spans, strict=True):
            top = tuple(
                self._make_likelihood(
                    token, logprob, piece if token == each.token else self._get_piece(token, at_start)
                )
                for token, logprob in each.top
            )
            entry = TokenLogprobs(self._make_likelihood(each.token, each.logprob, piece), top)
            self._placed.append((self._length + start, self._length + end, entry))
        self._length += len(grown)
        self._open = []

    def _get_piece(self, token: int, at_start: bool) -> bytes:
        return b"" if token in self._ends else self._decoder.get_piece(token, at_start=at_start)

    def _make_likelihood(self, token: int, logprob: float | None, piece: bytes) -> Likelihood:
        silent = token in self._ends or self._decoder.is_special(token)
        return Likelihood(token, logprob, piece, self._decoder.get_name(token) if silent else None)


def _replace_piece(entry: TokenLogprobs, piece: bytes) -> TokenLogprobs:
    """Replace the chosen token's piece, also where the token is among the likeliest."""
    chosen = entry.chosen.token
    top = tuple(replace(each, piece=piece) if each.token == chosen else each for each in entry.top)
    return TokenLogprobs(replace(entry.chosen, piece=piece), top)
