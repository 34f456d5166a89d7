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
from collections.abc import Iterator, Mapping
from typing import Any

from rankloom.engine.chat.pieces import CallArguments, CallBegin, Content, Piece, count_open, find_first
from rankloom.engine.grammar import JSON_OPTIONS
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
        """What is to be read."""
        self._opened = ""
        """What was read since a call began, and is content if none comes."""
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


def _find_property(schema: Mapping[str, Any], name: str) -> Any:
    """Return the schema of an argument, with the definitions that it may name."""
    own = schema.get("properties", {}).get(name, {})
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return own | definitions if isinstance(own, dict) else own


def _read_value(text: str, schema: Any) -> Any:
    """Return what a parameter's text means: JSON where its schema allows that, else the text itself."""
    kinds = set(_list_kinds(schema, schema))
    value: Any
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _PYTHONS.get(text.strip(), text)
    kind = _KINDS[type(value)]
    fits = kind in kinds or (kind == "integer" and "number" in kinds)
    return value if fits and not ("string" in kinds and kind != "null") else text


def _list_kinds(schema: Any, root: Any, depth: int = 0) -> Iterator[str]:
    """Yield the types that a schema allows; all where it does not say."""
    if not isinstance(schema, dict) or depth > 8:
        yield from _KINDS.values()
    elif "$ref" in schema:
        at = root
        for part in str(schema["$ref"]).removeprefix("#/").split("/"):
            at = at.get(part, {}) if isinstance(at, dict) else {}
        yield from _list_kinds(at, root, depth + 1)
    elif "enum" in schema or "const" in schema:
        yield from (_KINDS[type(value)] for value in schema.get("enum", [schema.get("const")]))
    elif "type" in schema:
        yield from [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    elif parts := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        for part in parts:
            yield from _list_kinds(part, root, depth + 1)
    else:
        yield from _KINDS.values()


def write_parameters(name: str, schema: Mapping[str, Any]) -> str:
    """Return the rule `name` of a call's parameters, and the rules that it needs.

    Raises:
        RequestError: the schema has what can't be held to in this format.
    """
    if extra := schema.keys() - _NOTES - {"type", "properties", "required", "additionalProperties"}:
        raise RequestError(f"tools: {min(extra)!r} of a tool's parameters can't be honoured in this template's calls")
    terms, rules = [], []
    for i, key in enumerate(schema.get("properties", {})):
        value = _find_property(schema, key)
        is_text = "string" in set(_list_kinds(value, value))
        rule = f"{name}_{i}"
        begin = json.dumps(f"<parameter={key}>\n", ensure_ascii=False)
        terms.append(rule if key in schema.get("required", ()) else f"{rule}?")
        rules.append(f"{rule}: {begin} {rule}_value")
        rules.append(_write_text(f"{rule}_value", key, value) if is_text else _write_json(f"{rule}_value", value))
    return "\n".join([f"{name}: {' '.join(terms)}" if terms else f'{name}: ""', *rules])


def _write_json(rule: str, schema: Any) -> str:
    options = {"x-guidance": JSON_OPTIONS}
    return f'{rule}: %json {json.dumps(schema | options)} "\\n{_PARAMETER_END}\\n"'


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
        if part.keys() - _NOTES - {"type"}:
            raise RequestError(f"tools: 'anyOf' of the text {key!r} can't be honoured in this template's calls")
    length = f"{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}"
    return rf"{rule}[lazy]: /(?s:.){length}\n<\/parameter>\n/"
