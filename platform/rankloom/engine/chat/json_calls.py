"""Calls of tools that a model writes as JSON, as in Hermes's, Qwen's, Llama 3's and Mistral's templates."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass

from rankloom.engine.chat.pieces import CallArguments, CallBegin, Content, Piece, count_open, find_first


@dataclass(frozen=True)
class JsonFormat:
    """How a template marks calls that are objects with a name and arguments."""

    opens: tuple[str, ...]
    """Marks that begin calls."""
    close: str | None = None
    """The mark that ends them; None: nothing but calls comes after the first."""
    between: str = " \n\t\r"
    """Characters around calls."""
    bare: bool = False
    """Whether a completion that begins with an object may be a call."""
    named: str | None = None
    """The mark between a call's name and its arguments, where the call is not one object."""


class JsonCallParser:
    """Reads calls in one of these formats. What is not a call of a known tool stays content."""

    def __init__(self, format: JsonFormat, names: Collection[str]) -> None:
        self._format, self._names = format, names
        self._marks = format.opens if format.close is None else (*format.opens, format.close)
        self._text = ""
        """Text that is not read yet."""
        self._opened = ""
        """Text read since calls began; it is content if no call comes."""
        self._is_open, self._has_calls, self._may_be_bare = False, False, format.bare
        self._call: _Call | None = None

    def push(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while self._text and self._read_next(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        text = "" if self._is_open and self._has_calls else self._opened + self._text
        self._opened = self._text = ""
        return [Content(text)] if text else []

    def _read_next(self, pieces: list[Piece]) -> bool:
        """Read from the text. Returns False where more has to come."""
        if self._call is not None:
            return self._read_call(pieces, self._call)
        return self._read_between(pieces) if self._is_open else self._read_content(pieces)

    def _read_content(self, pieces: list[Piece]) -> bool:
        if self._may_be_bare and (begin := self._text.lstrip()):
            self._may_be_bare, self._is_open = False, begin[0] == "{"
            return True
        found = find_first(self._text, self._format.opens)
        end = found[0] if found else len(self._text) - count_open(self._text, self._format.opens)
        # space may stand before a call, and then is not content
        content = self._text[:end].rstrip("\n") if found is None else self._text[:end].rstrip()
        if content:
            pieces.append(Content(content))
        self._text = self._text[len(content) if found is None else end :]
        if found is None:
            return False
        self._open(found[1])
        return True

    def _read_between(self, pieces: list[Piece]) -> bool:
        text = self._text.lstrip(self._format.between)
        if self._has_calls:
            self._text = text
        else:
            self._take(len(self._text) - len(text))
        for mark in self._marks:
            if text.startswith(mark):
                self._is_open = mark != self._format.close
                self._take(len(mark))
                if not self._is_open:
                    self._opened, self._has_calls = "", False
                return True
        if count_open(text, self._marks) == len(text):
            return False
        if text[0] == "{" or self._format.named is not None:
            self._call = _Call(self._names, self._format.named)
        else:
            self._give_up(pieces)
        return True

    def _read_call(self, pieces: list[Piece], call: _Call) -> bool:
        num_read, found = call.read(self._text)
        pieces += found
        self._take(num_read)
        if call.is_begun:
            self._opened, self._has_calls = "", True
        if call.is_over:
            self._call = None
            if not call.is_begun:
                self._give_up(pieces)
        return True

    def _open(self, mark: str) -> None:
        self._is_open = True
        self._take(len(mark))

    def _take(self, length: int) -> None:
        self._opened, self._text = self._opened + self._text[:length], self._text[length:]

    def _give_up(self, pieces: list[Piece]) -> None:
        """Make content of what looked like a call."""
        if self._opened:
            pieces.append(Content(self._opened))
        self._opened, self._is_open, self._has_calls = "", False, False


_HEAD = re.compile(
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
"""The beginning of a call up to its arguments, in the usual order of keys: the arguments are given as they come."""


class _Call:
    """One call, which comes in parts."""

    def __init__(self, names: Collection[str], named: str | None) -> None:
        self._names, self._named = names, named
        self._text = ""
        self._object = JsonEnd() if named is None else None
        self._arguments: JsonEnd | None = None
        self._given = 0
        """Where in the text the arguments begin that were not given yet."""
        self.is_begun = self.is_over = False

    def read(self, text: str) -> tuple[int, list[Piece]]:
        """Read up to the end of the call, or of the text. Returns how much was read, and pieces."""
        end = None if self._object is None else self._object.find(text)
        before = len(self._text)
        self._text += text[:end]
        pieces = [] if self.is_begun else self._begin()
        pieces += self._give()
        if self._named is not None and self.is_begun and self._arguments is None:
            self.is_over = True
            return self._given - before, pieces
        if end is not None:
            self.is_over = True
            if not self.is_begun:
                pieces += self._read_whole()
        return len(text) if end is None else end, pieces

    def _begin(self) -> list[Piece]:
        if self._named is None:
            head = _HEAD.match(self._text)
            name, end = (head[1], head.end()) if head else ("", 0)
        else:
            name, mark, _ = self._text.partition(self._named)
            end = len(name) + len(mark)
            name = name.partition("[CALL_ID]")[0].strip() if mark else ""
            self.is_over = bool(mark) and name not in self._names
        if name not in self._names:
            return []
        self.is_begun, self._arguments, self._given = True, JsonEnd(), end
        return [CallBegin(name)]

    def _give(self) -> list[Piece]:
        """Return the arguments that have come."""
        if self._arguments is None:
            return []
        new = self._text[self._given :]
        end = self._arguments.find(new)
        if end is not None:
            self._arguments, new = None, new[:end]
        self._given += len(new)
        return [CallArguments(new)] if new else []

    def _read_whole(self) -> list[Piece]:
        """Read a call whose keys stand in another order."""
        try:
            call = json.loads(self._text, strict=False)
        except (ValueError, RecursionError):
            return []
        name = call.get("name")
        if not isinstance(name, str) or name not in self._names:
            return []
        self.is_begun = True
        arguments = call.get("arguments", call.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [CallBegin(name), CallArguments(text)]


_SIGNS = re.compile(r'[{}\[\]"\\]')


class JsonEnd:
    """Finds where an object ends that comes in parts."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = False

    def find(self, text: str) -> int | None:
        """Return where in this part the object ends; None: it does not."""
        at = 0
        if self._is_escaped and text:
            self._is_escaped, at = False, 1
        while (sign := _SIGNS.search(text, at)) is not None:
            at = sign.end()
            if sign[0] == '"':
                self._in_string = not self._in_string
            elif sign[0] == "\\":
                if self._in_string and at == len(text):
                    self._is_escaped = True
                at += self._in_string
            elif not self._in_string:
                self._depth += 1 if sign[0] in "{[" else -1
                if self._depth == 0:
                    return at
        return None
