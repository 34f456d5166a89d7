"""The pieces that a completion's text is read into as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Thinking:
    text: str


@dataclass(frozen=True)
class CallBegin:
    """A call of a tool begins; `CallArguments` follow."""

    name: str


@dataclass(frozen=True)
class CallArguments:
    """A part of the latest call's arguments, which are JSON."""

    text: str


Piece = Content | Thinking | CallBegin | CallArguments


class Parser(Protocol):
    """Reads one completion."""

    def push(self, text: str) -> list[Piece]:
        """Return what has become certain with more text."""
        ...

    def finish(self) -> list[Piece]:
        """Return what is left at the end."""
        ...


class PlainParser:
    """All text is content."""

    def push(self, text: str) -> list[Piece]:
        return [Content(text)] if text else []

    def finish(self) -> list[Piece]:
        return []


def find_first(text: str, marks: Iterable[str], start: int = 0) -> tuple[int, str] | None:
    """Return where the first of some marks begins, and which it is; None: none is there."""
    found = [(at, mark) for mark in marks if (at := text.find(mark, start)) >= 0]
    return min(found, key=lambda each: (each[0], -len(each[1])), default=None)


def count_open(text: str, marks: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a mark."""
    longest = max(map(len, marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks if len(mark) > length):
            return length
    return 0
