"""Text of somebody else's (a record's, a data set's, a model's), as it may be shown."""

from __future__ import annotations

import re

_OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, which a terminal obeys, and those that begin a line or turn its direction."""


def printable(text: str, keep: str = "") -> str:
    """The text with what a terminal would obey spelt out, as `\\x1b`; `keep`: characters that stay."""

    def spelt(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode()

    return _OBEYED.sub(spelt, text)
