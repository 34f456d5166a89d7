"""ChatReader: the deltas of a completion, with its text split into the answer, thinking and calls of tools."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace

from rankloom.engine.chat.pieces import CallArguments, CallBegin, Content, Parser, Piece, Thinking
from rankloom.engine.protocol import CallDelta, Delta


class ChatReader:
    """Reads one completion."""

    def __init__(self, parser: Parser, *, parallel: bool) -> None:
        """`parallel`: whether calls after the first are kept."""
        self._parser = parser
        self._most = None if parallel else 1
        self._num_calls = 0

    def read(self, delta: Delta) -> Delta:
        pieces = self._parser.push(delta.text)
        if delta.finish is not None:
            pieces += self._parser.finish()
        text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        thinking = "".join(piece.text for piece in pieces if isinstance(piece, Thinking))
        calls = self._read_calls(pieces)
        finish = "tool_calls" if delta.finish == "stop" and self._num_calls else delta.finish
        return replace(delta, text=text, thinking=thinking, calls=calls, finish=finish)

    def _read_calls(self, pieces: Sequence[Piece]) -> tuple[CallDelta, ...]:
        calls: list[CallDelta] = []
        for piece in pieces:
            if isinstance(piece, CallBegin):
                self._num_calls += 1
                # nine letters and digits, as Mistral's templates want them
                calls.append(CallDelta(self._num_calls - 1, uuid.uuid4().hex[:9], piece.name, ""))
            elif isinstance(piece, CallArguments):
                if calls and calls[-1].index == self._num_calls - 1:
                    calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + piece.text)
                else:
                    calls.append(CallDelta(self._num_calls - 1, None, None, piece.text))
        return tuple(call for call in calls if self._most is None or call.index < self._most)
