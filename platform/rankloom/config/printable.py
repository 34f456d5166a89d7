"""Escapes foreign text (of a record, a data set or a model), so that it is safe to show."""

from __future__ import annotations

import re

_OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, which a terminal obeys, and characters that begin a line or change its direction."""


def escape_unprintable(text: str, keep: str = "") -> str:
    """Return the text with every character that a terminal would obey escaped, as `\\x1b`.

    Args:
        keep: characters to leave as they are.
    """

    def escape(match: re.Match[str]) -> str:
        return match[0] if match[0] in keep else match[0].encode("unicode_escape").decode()

    return _OBEYED.sub(escape, text)
