"""gpt-oss's format, harmony: messages on channels, of which the final one is the answer."""

from __future__ import annotations

import re
from collections.abc import Collection

from rankloom.engine.chat.pieces import (
    CallArguments,
    CallBegin,
    Content,
    Piece,
    Thinking,
    count_open,
    find_first,
)

START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN = (
    f"<|{name}|>" for name in ("start", "channel", "constrain", "message", "end", "call", "return")
)
_ENDS = (END, CALL, RETURN, START)
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=functions\.([\w.-]+)")


class HarmonyParser:
    """Reads messages: `analysis` is thinking, one to a function is a call, the rest is content."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._text = ""
        self._body: type[Content] | type[Thinking] | type[CallArguments] | None = None
        """The kind of the current message; None: its head is not complete."""

    def push(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while self._text:
            if self._body is None:
                head, mark, rest = self._text.partition(MESSAGE)
                if not mark:
                    break
                self._text = rest
                pieces += self._begin(head)
                continue
            found = find_first(self._text, _ENDS)
            end = found[0] if found else len(self._text) - count_open(self._text, _ENDS)
            if end:
                pieces.append(self._body(self._text[:end]))
            self._text = self._text[end:].removeprefix(found[1] if found else "")
            if found is None:
                break
            self._body = None
        return pieces

    def finish(self) -> list[Piece]:
        text, self._text = self._text, ""
        if self._body is not None:
            return [self._body(text)] if text else []
        # a completion without channels, as one that is constrained to given texts
        return [Content(text)] if text and CHANNEL not in text and START not in text else []

    def _begin(self, head: str) -> list[Piece]:
        recipient, channel = _RECIPIENT.search(head), _CHANNEL.search(head)
        if recipient is not None and recipient[1] in self._names:
            self._body = CallArguments
            return [CallBegin(recipient[1])]
        self._body = Thinking if channel is not None and channel[1] == "analysis" else Content
        return []
