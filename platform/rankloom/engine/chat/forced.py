"""Grammars in llguidance's variant of Lark's notation: of calls of tools, and of what may come before an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import regex_to_lark

from rankloom.engine.grammar import JSON_OPTIONS
from rankloom.engine.protocol import Grammar
from rankloom.errors import RequestError

Spell = Callable[[str], str]
"""Returns the terms for a text: its special tokens as such, the rest in quotes."""
TEXT = "TEXT: /(?s:.+)/"
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class CallSyntax:
    """How a template writes calls: `mark first (begin name middle arguments end) (between ...)* last`."""

    mark: str
    """The mark of calls, which no text before them contains; empty: calls stand alone."""
    begin: str
    middle: str
    end: str
    first: str = ""
    between: str | None = None
    """None: a turn has one call."""
    last: str = ""
    write_arguments: Callable[[str, Mapping[str, Any]], str] | None = None
    """Returns the rule of a name for arguments of a schema; None: they are JSON."""


def write_calls(tools: Sequence[Mapping[str, Any]], syntax: CallSyntax, spell: Spell, *, several: bool) -> str:
    """Return the rule `calls` of one call of one of the tools, or of several, and the rules that it needs.

    The rule `opened` is the same after the mark.
    """
    more = f" ({spell(syntax.between)} call)*" if several and syntax.between is not None else ""
    rules = [
        f"calls: {spell(syntax.mark)} opened",
        f"opened: {spell(syntax.first)} call{more} {spell(syntax.last)}",
        "call: " + " | ".join(f"call_{i}" for i in range(len(tools))),
    ]
    for i, function in enumerate(tool["function"] for tool in tools):
        begin = spell(f"{syntax.begin}{function['name']}{syntax.middle}")
        rules.append(f"call_{i}: {begin} arguments_{i} {spell(syntax.end)}")
        schema = function.get("parameters") or NO_PARAMETERS
        write = syntax.write_arguments or _write_json_rule
        rules.append(write(f"arguments_{i}", schema))
    return "\n".join(rules)


def write_text_or_calls(mark: str, spell: Spell) -> str:
    """Return the rule `answer` of text, calls, or both, and the rules that it needs beside those of `write_calls`."""
    if spell(mark).startswith("<["):  # a token, which no text has
        return f"answer: TEXT? calls?\n{TEXT}"
    spelt = re.escape(mark).replace("/", r"\/")
    return f"answer: TEXT? | before opened\nTEXT: /(?s:.+)/ & ~/(?s:.*){spelt}(?s:.*)/\nbefore[lazy]: /(?s:.*){spelt}/"


def write_reply(grammar: Grammar) -> str:
    """Return the rule `reply` of a schema or a regular expression. Raises RequestError where there can't be one."""
    if grammar.kind == "regex":
        return f"reply: /{regex_to_lark(grammar.text)}/"
    try:
        schema = json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema can't be honoured: {error}") from None
    return f"reply: {write_json({} if schema is True else schema)}"


def make_speller(special: Mapping[str, int]) -> Spell:
    """Return what spells texts.

    Args:
        special: the tokens, by their text, that stand for it in whole.
    """
    pattern = re.compile("|".join(map(re.escape, special))) if special else None

    def spell(text: str) -> str:
        terms, at = [], 0
        for found in pattern.finditer(text) if pattern else ():
            terms += [text[at : found.start()], special[found[0]]]
            at = found.end()
        terms.append(text[at:])
        return " ".join(f"<[{term}]>" if isinstance(term, int) else json.dumps(term) for term in terms if term != "")

    return spell


def write_json(schema: Any) -> str:
    """Return the term for JSON of a schema."""
    options = {"x-guidance": JSON_OPTIONS}
    return f"%json {json.dumps(schema | options if isinstance(schema, dict) else schema)}"


def _write_json_rule(name: str, schema: Mapping[str, Any]) -> str:
    return f"{name}: {write_json(schema)}"
