"""Place: which characters of a text a token's bytes are, where one may hold a part of a character alone."""

from __future__ import annotations

import codecs
from dataclasses import dataclass


@dataclass
class TextOffset:
    """Where in a text its bytes have got to."""

    characters: int = 0
    part: bytes = b""
    """Of a character that is not whole yet."""

    def take(self, piece: bytes) -> tuple[int, int]:
        """From where to where in the text a piece is, in characters, one that it has a part of included; goes on behind
        the piece.
        """
        try:
            codecs.getincrementaldecoder("utf-8")().decode(self.part + piece[:1])
        except UnicodeDecodeError:  # the part stays one, and shows as U+FFFD
            self.characters, self.part = self.characters + bool(self.part), b""
        begin, decoder = self.characters, codecs.getincrementaldecoder("utf-8")("replace")
        self.characters += len(decoder.decode(self.part + piece))
        self.part = decoder.getstate()[0]
        return begin, self.characters + bool(piece and self.part)
