"""Calls of tools as Qwen3-Coder writes them: an element a function, with one a parameter, whose texts have no quotes.

    <tool_call>
    <function=pay>
    <parameter=cents>
    5
    </parameter>
    </function>
    </tool_call>

What a parameter's text means depends on its schema, so both the parser and the grammar know the tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher

from rankloom.engine.chat.forced import write_json
from rankloom.engine.chat.pieces import CallArguments, CallBegin, Content, Piece, count_open, find_first
from rankloom.errors import RequestError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END, _PARAMETER_END = "<function=", "</function>", "</parameter>"
_HEAD = re.compile(r"<function=([^>\n]+)>")
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>")
_KINDS = {
    str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null",
}  # fmt: skip
_PYTHONS = {"True": True, "False": False, "None": None}
"""Values that templates write as Python does."""
LONGEST_HEAD = 200
"""Characters after which what begins as a function's head is none."""
_NOTES = {"title", "description", "default", "examples", "deprecated", "$defs", "definitions", "$schema"}
"""Keywords that allow and forbid nothing."""


class XmlCallParser:
    """Reads such calls. What is not a call of a known tool stays content."""

    def __init__(self, tools: Mapping[str, Mapping[str, Any]]) -> None:
        """`tools`: the schema of the arguments of each."""
        self._tools = tools
        self._text = ""
        """Text that is not read yet."""
        self._opened = ""
        """Text read since a call began; it is content if no call comes."""
        self._name: str | None = None
        """The function whose parameters come."""
        self._num_parameters = 0
        self._is_after = False
        """Whether a call has ended, and no content has come since."""

    def push(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while self._text and (self._read_content if self._name is None else self._read_parameter)(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        text, self._text = (self._opened + self._text if self._name is None else ""), ""
        return [Content(text)] if text and not (self._is_after and not text.strip()) else []

    def _read_content(self, pieces: list[Piece]) -> bool:
        """Read up to a function's head. Returns False where more has to come."""
        marks = (OPEN, _FUNCTION, CLOSE) if self._is_after else (OPEN, _FUNCTION)
        if self._opened or self._text.startswith(_FUNCTION):
            return self._read_head(pieces)
        found = find_first(self._text, marks)
        end = found[0] if found else len(self._text) - count_open(self._text, marks)
        content = self._text[:end].rstrip() if found else self._text[:end].rstrip("\n")
        if content and not (self._is_after and not content.strip()):
            pieces.append(Content(content))
            self._is_after = False
        self._text = self._text[end if found else len(content) :]
        if found is None:
            return False
        if found[1] == CLOSE:
            self._text = self._text.removeprefix(CLOSE)
        elif found[1] == OPEN:
            self._opened, self._text = OPEN, self._text.removeprefix(OPEN)
        return True

    def _read_head(self, pieces: list[Piece]) -> bool:
        begin = self._text.lstrip()
        head = _HEAD.match(begin)
        is_beginning = _FUNCTION.startswith(begin[: len(_FUNCTION)]) and "\n" not in begin and len(begin) < LONGEST_HEAD
        if head is None and is_beginning:
            return False
        name = head[1].strip() if head is not None else ""
        if name in self._tools:
            assert head is not None
            self._name, self._opened, self._num_parameters = name, "", 0
            self._text = begin[head.end() :]
            pieces += [CallBegin(name), CallArguments("{")]
        else:
            taken = len(self._text) - len(begin) + (len(_FUNCTION) if begin.startswith(_FUNCTION) else 0)
            pieces.append(Content(self._opened + self._text[:taken]))
            self._opened, self._text, self._is_after = "", self._text[taken:], False
        return True

    def _read_parameter(self, pieces: list[Piece]) -> bool:
        found = find_first(self._text, (_FUNCTION_END, "<parameter="))
        if found is None:
            return False
        if found[1] == _FUNCTION_END:
            pieces.append(CallArguments("}"))
            self._text = self._text[found[0] + len(_FUNCTION_END) :]
            self._name, self._is_after = None, True
            return True
        head = _PARAMETER.match(self._text, found[0])
        end = self._text.find(_PARAMETER_END, found[0])
        if head is None or end < 0:
            return False
        text = self._text[head.end() : end].removeprefix("\n").removesuffix("\n")
        assert self._name is not None
        value = _read_value(text, _find_property(self._tools[self._name], head[1].strip()))
        comma = ", " if self._num_parameters else ""
        written = f"{json.dumps(head[1].strip(), ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"
        pieces.append(CallArguments(f"{comma}{written}"))
        self._num_parameters += 1
        self._text = self._text[end + len(_PARAMETER_END) :]
        return True


def _find_property(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the schema of an argument, with the definitions that it may name."""
    properties = schema.get("properties")
    own = properties.get(name) if isinstance(properties, dict) else None
    if not isinstance(own, dict):
        own = {"not": {}} if own is False else {}
    return own | {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def _read_value(text: str, schema: Mapping[str, Any]) -> Any:
    """Return what a parameter's text means: JSON where its schema allows that, else the text itself."""
    kinds = _list_kinds(schema)
    value: Any
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _PYTHONS.get(text.strip(), text)
    kind = _KINDS[type(value)]
    fits = kind in kinds or (kind == "integer" and "number" in kinds)
    return value if fits and not ("string" in kinds and kind != "null") else text


def _list_kinds(schema: Mapping[str, Any]) -> set[str]:
    """Return the types that a schema allows; all where it does not say."""
    kinds, seen, parts = set[str](), set[int](), list[Any]([schema])
    while parts:
        part = parts.pop()
        if id(part) in seen:  # else definitions that name each other would take time without end
            continue
        seen.add(id(part))
        match part:
            case {"$ref": ref}:
                parts.append(_find_definition(schema, str(ref)))
            case {"enum": list(values)}:
                kinds.update(_KINDS[type(value)] for value in values)
            case {"const": value}:
                kinds.add(_KINDS[type(value)])
            case {"type": str(kind)}:
                kinds.add(kind)
            case {"type": list(listed)}:
                kinds.update(map(str, listed))
            case {"anyOf": [_, *_] as more} | {"oneOf": [_, *_] as more} | {"allOf": [_, *_] as more}:
                parts += more
            case _:
                kinds.update(_KINDS.values())
    return kinds


def _find_definition(schema: Any, ref: str) -> Any:
    for key in ref.removeprefix("#/").split("/"):
        schema = schema.get(key, {}) if isinstance(schema, dict) else {}
    return schema


def write_parameters(name: str, schema: Mapping[str, Any]) -> str:
    """Return the rule `name` of a call's parameters, and the rules that it needs.

    Raises:
        RequestError: the schema is malformed, or has what can't be held to in this format.
    """
    if extra := schema.keys() - _NOTES - {"type", "properties", "required", "additionalProperties"}:
        raise RequestError(f"tools: {min(extra)!r} of a tool's parameters can't be honoured in this template's calls")
    if error := LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(dict(schema))):
        raise RequestError(f"tools: a tool's parameters can't be honoured: {error}")
    terms, rules = [], []
    for i, key in enumerate(schema.get("properties", {})):
        value, rule = _find_property(schema, key), f"{name}_{i}"
        begin = json.dumps(f"<parameter={key}>\n", ensure_ascii=False)
        terms.append(rule if key in schema.get("required", ()) else f"{rule}?")
        rules.append(f"{rule}: {begin} {rule}_value")
        if "string" in _list_kinds(value):
            rules.append(_write_text(f"{rule}_value", key, value))
        else:
            rules.append(f'{rule}_value: {write_json(value)} "\\n{_PARAMETER_END}\\n"')
    return "\n".join([f"{name}: {' '.join(terms)}" if terms else f'{name}: ""', *rules])


def _write_text(rule: str, key: str, schema: Mapping[str, Any]) -> str:
    """Return the rule of a text up to the end of its element."""
    end = f"\n{_PARAMETER_END}\n"
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices is not None:
        written = [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]
        return f"{rule}: " + " | ".join(json.dumps(text + end, ensure_ascii=False) for text in written)
    if extra := schema.keys() - _NOTES - {"type", "minLength", "maxLength", "anyOf"}:
        raise RequestError(f"tools: {min(extra)!r} of the text {key!r} can't be honoured in this template's calls")
    for part in schema.get("anyOf", ()):
        if not isinstance(part, dict) or part.keys() - _NOTES - {"type"}:
            raise RequestError(f"tools: 'anyOf' of the text {key!r} can't be honoured in this template's calls")
    length = f"{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}"
    return rf"{rule}[lazy]: /(?s:.){length}\n<\/parameter>\n/"
