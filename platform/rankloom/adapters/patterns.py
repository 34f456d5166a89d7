"""PEFT's rank_pattern and alpha_pattern, looked up by layer in a time that does not grow with the number of keys.

PEFT takes each key for a regular expression that has to match the end of a layer's name, and tries all of them on each
layer, in order: with a key for each layer of a large base that takes minutes. Nearly all keys are plain names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, KeysView, Mapping
from typing import TypeVar

import regex

T = TypeVar("T")
MAX_EXPRESSIONS = 1000
TIMEOUT_S = 1.0
"""For one match: a stranger's regular expression can take for ever."""

_PLAIN = re.compile(r"\^?[\w.\-]+")


class ByModule(dict[str, T]):
    """Values by a layer's full name. PEFT sees no keys to try, and looks the name up."""

    def keys(self) -> KeysView[str]:  # type: ignore[override]  # what dict gives is a class of its own
        return dict[str, T]().keys()


def by_module(patterns: Mapping[str, T], names: Iterable[str]) -> ByModule[T]:
    """For each name the value of the first key that matches it, if any. In a plain name a dot is a dot.

    Raises:
        ValueError: a key is no regular expression or takes too long, or too many are no plain names.
    """
    places = {key: place for place, key in enumerate(patterns)}
    expressions = [key for key in patterns if not _PLAIN.fullmatch(key)]
    if len(expressions) > MAX_EXPRESSIONS:
        raise ValueError(f"{len(expressions)} keys are regular expressions (allowed: {MAX_EXPRESSIONS}); use names")
    compiled = [(places[key], _compiled(rf"(.*\.)?({key})")) for key in expressions]
    values, found = list(patterns.values()), ByModule[T]()
    for name in names:
        parts = name.split(".")
        plain = [f"^{name}", *(".".join(parts[start:]) for start in range(len(parts)))]
        first = min((places[key] for key in plain if key in places), default=len(values))
        first = next((place for place, each in compiled if place < first and _matches(each, name)), first)
        if first < len(values):
            found[name] = values[first]
    return found


def fullmatch(expression: str, name: str) -> bool:
    """As `re.fullmatch`.

    Raises:
        ValueError: it is no regular expression, or takes too long.
    """
    return _matches(_compiled(expression), name)


def _compiled(expression: str) -> regex.Pattern[str]:
    try:
        return regex.compile(expression)
    except regex.error as error:
        raise ValueError(f"{expression!r:.80} is no regular expression: {error}") from None


def _matches(expression: regex.Pattern[str], name: str) -> bool:
    try:
        return expression.fullmatch(name, timeout=TIMEOUT_S) is not None
    except TimeoutError:
        raise ValueError(f"{expression.pattern!r:.80} takes longer than {TIMEOUT_S:g} s to match {name}") from None


def scaling_of(alpha: float, rank: int, rslora: bool) -> float:
    """Return what PEFT multiplies B·A by: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)
