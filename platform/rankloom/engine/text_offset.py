"""TextOffset: the characters of a text that each token's bytes belong to; a token may hold a part of a character."""

from __future__ import annotations

import codecs
from dataclasses import dataclass


@dataclass
class TextOffset:
    """The position in a text after the bytes so far."""

    characters: int = 0
    part: bytes = b""
    """The bytes of an unfinished character."""

    def take(self, piece: bytes) -> tuple[int, int]:
        """Return where in the text a piece begins and ends, in characters, and advance past it.

        A character that the piece holds a part of counts.
        """
        try:
            codecs.getincrementaldecoder("utf-8")().decode(self.part + piece[:1])
        except UnicodeDecodeError:  # the part stays one, and shows as U+FFFD
            self.characters, self.part = self.characters + bool(self.part), b""
        begin, decoder = self.characters, codecs.getincrementaldecoder("utf-8")("replace")
        self.characters += len(decoder.decode(self.part + piece))
        self.part = decoder.getstate()[0]
        return begin, self.characters + bool(piece and self.part)
