"""Looks up PEFT's rank_pattern and alpha_pattern by layer, in a time that does not grow with the number of keys.

PEFT reads each key as a regular expression that must match the end of a layer's name, and tries all keys on each layer,
in order: with a key for each layer of a large base that takes minutes. Nearly all keys are plain names.
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
"""Limit of one match in seconds: a stranger's regular expression can run forever."""

_PLAIN = re.compile(r"\^?[\w.\-]+")


class ByModule(dict[str, T]):
    """Values by a layer's full name, without keys for PEFT to try, so that it looks the name up."""

    def keys(self) -> KeysView[str]:  # type: ignore[override]  # what dict gives is a class of its own
        return dict[str, T]().keys()


def resolve_patterns(patterns: Mapping[str, T], names: Iterable[str]) -> ByModule[T]:
    """Return for each name the value of the first key that matches it, if any. In a plain name a dot is a dot.

    Args:
        patterns: key, a plain name or a regular expression -> value.
        names: full names of the layers.

    Raises:
        ValueError: a key is not a regular expression or takes too long, or too many are not plain names.
    """
    places = {key: place for place, key in enumerate(patterns)}
    expressions = [key for key in patterns if not _PLAIN.fullmatch(key)]
    if len(expressions) > MAX_EXPRESSIONS:
        raise ValueError(f"{len(expressions)} keys are regular expressions (allowed: {MAX_EXPRESSIONS}); use names")
    compiled = [(places[key], _compile(rf"(.*\.)?({key})")) for key in expressions]
    values, resolved = list(patterns.values()), ByModule[T]()
    for name in names:
        parts = name.split(".")
        plain = [f"^{name}", *(".".join(parts[start:]) for start in range(len(parts)))]
        first = min((places[key] for key in plain if key in places), default=len(values))
        first = next((place for place, each in compiled if place < first and _matches(each, name)), first)
        if first < len(values):
            resolved[name] = values[first]
    return resolved


def match_whole(expression: str, name: str) -> bool:
    """Return whether an expression matches a whole name, as `re.fullmatch`, with a time limit.

    Raises:
        ValueError: it is not a regular expression, or takes too long.
    """
    return _matches(_compile(expression), name)


def _compile(expression: str) -> regex.Pattern[str]:
    try:
        return regex.compile(expression)
    except regex.error as error:
        raise ValueError(f"{expression!r:.80} is not a regular expression: {error}") from None


def _matches(expression: regex.Pattern[str], name: str) -> bool:
    try:
        return expression.fullmatch(name, timeout=TIMEOUT_S) is not None
    except TimeoutError:
        raise ValueError(f"{expression.pattern!r:.80} takes longer than {TIMEOUT_S:g} s to match {name}") from None


def compute_lora_scaling(alpha: float, rank: int, rslora: bool) -> float:
    """Return PEFT's factor of B·A: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)
