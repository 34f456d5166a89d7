"""Thinking between `<think>` and `</think>` at the start of a completion, before what another parser reads."""

from __future__ import annotations

from typing import Literal

from rankloom.engine.chat.pieces import Parser, Piece, Thinking, count_open

BEGIN, END = "<think>", "</think>"


class ThinkingParser:
    """Splits the thinking off."""

    def __init__(self, rest: Parser, *, begun: bool) -> None:
        """
        Args:
            rest: reads what comes after it.
            begun: whether the prompt ends with the beginning of the thinking.
        """
        self._rest, self._text = rest, ""
        self._state: Literal["before", "thinking", "after", "rest"] = "thinking" if begun else "before"

    def push(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        if self._state == "before":
            begin = self._text.lstrip()
            if begin.startswith(BEGIN):
                self._text, self._state = begin[len(BEGIN) :], "thinking"
            elif not BEGIN.startswith(begin):
                self._state = "rest"
        if self._state == "thinking":
            pieces += self._read_thought()
        if self._state == "after":  # the lines between belong to neither
            self._text = self._text.lstrip("\n")
            self._state = "rest" if self._text else "after"
        return [*pieces, *self._give()] if self._state == "rest" else pieces

    def finish(self) -> list[Piece]:
        if self._state == "thinking":
            return [Thinking(self._text)] if self._text else []
        return [*self._give(), *self._rest.finish()]

    def _read_thought(self) -> list[Piece]:
        thought, mark, rest = self._text.partition(END)
        if mark:
            self._text, self._state = rest, "after"
        else:
            certain = len(self._text) - count_open(self._text, [END])
            thought, self._text = self._text[:certain], self._text[certain:]
        return [Thinking(thought)] if thought else []

    def _give(self) -> list[Piece]:
        """Give what is there to the other parser."""
        text, self._text = self._text, ""
        return self._rest.push(text)
