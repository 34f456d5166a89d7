"""Turns conversations of files into the messages that a chat template takes.

Reads OpenAI's format and its older one (functions), ShareGPT's (from, value) and TRL's (prompt and completion as
messages). Other keys of a message than role and content are kept, for the template to show.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Mapping
from typing import Any

from rankloom.data.template import Message
from rankloom.errors import DataError

NESTED = "\0json\0"
"""Prefix of a cell that holds JSON: a list or a mapping from a JSON file, whose columns are texts."""
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
SAME_ROLES = {"developer": "system", "function": "tool"}
"""Newer or older name of a role -> the role."""
ROLES = ("system", "user", "assistant", "tool")


def decode_cell(cell: Any) -> Any:
    """Return a cell's value, without the null keys of mappings, which Arrow adds."""
    if isinstance(cell, str) and cell.startswith(NESTED):
        return json.loads(cell[len(NESTED) :])
    return _drop_nulls(cell)


def to_text(value: Any, name: str, column: str) -> str:
    """Return a value as text; "" for None and NaN.

    Args:
        name: the source and row, and
        column: the column, which the error names.

    Raises:
        DataError: the value is not a text, number or date.
    """
    if value is None:
        return ""
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        value = int(value) if value.is_integer() else value  # an integer column with a missing value is read as floats
    if isinstance(value, datetime.datetime):
        raise DataError(f"{name}: {column} must be text, found the point in time {str(value)!r}; write it as text")
    if isinstance(value, (str, int, float, decimal.Decimal, datetime.date, datetime.time)):
        return str(value)
    raise DataError(f"{name}: {column} must be text, found {type(value).__name__} {str(value)[:60]!r}")


def read_messages(given: Any, name: str, column: str = "messages") -> list[Message]:
    """Return the messages of a list; `weight` is kept only if it is 0.

    Raises:
        DataError: it is not a list of messages, or a message holds something that can't be trained on.
    """
    given = _parse_json(given)
    if not isinstance(given, list) or not all(
        isinstance(m, dict) and ({"role"} <= m.keys() or {"from", "value"} <= m.keys()) for m in given
    ):
        raise DataError(
            f"{name}: {column} must be a list of {{role: ..., content: ...}} (or ShareGPT's {{from: ..., "
            f"value: ...}}), found {str(given)[:80]!r}"
        )
    messages = [_read_message(m if "role" in m else _from_sharegpt(m), name, column) for m in given]
    roles = list(dict.fromkeys(m["role"] for m in messages))
    if messages and "assistant" not in roles and not set(roles) <= set(ROLES):
        raise DataError(
            f"{name}: no turn has the role assistant; roles here: {', '.join(roles)}; rename them to {', '.join(ROLES)}"
        )
    return messages


def read_tools(given: Any, name: str) -> list[Any] | None:
    """Return the tools of a row, given as a list, as its JSON, or as OpenAI's older functions."""
    given = _parse_json(given)
    if not given:
        return None
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise DataError(f"{name}: tools must be a list of {{type: function, function: ...}}, found {str(given)[:80]!r}")
    return [tool if "function" in tool or "name" not in tool else _as_function(tool) for tool in given]


def _read_message(given: Mapping[str, Any], name: str, column: str) -> Message:
    message = {key: value for key, value in given.items() if value is not None and value != []}
    role = str(message["role"])
    message["role"] = SAME_ROLES.get(role, role)
    content = given.get("content")
    if role == "tool" and _is_result(content):
        content = json.dumps(content, ensure_ascii=False)
    message["content"] = _read_content(content, name, f"{column}.content")
    if call := message.pop("function_call", None):  # the older format
        message["tool_calls"] = [_as_function(_parse_json(call))]
    if "tool_calls" in message:
        calls = _parse_json(message["tool_calls"])
        message["tool_calls"] = [_call(call, name, column) for call in (calls if isinstance(calls, list) else [calls])]
    if "weight" in message and message["weight"] not in (0, 1):
        raise DataError(f"{name}: {column}.weight must be 0 (no loss on this turn) or 1, found {message['weight']!r}")
    if message.get("weight") != 0:
        message.pop("weight", None)
    return message


def _from_sharegpt(given: Mapping[str, Any]) -> dict[str, Any]:
    source, value = str(given["from"]), given["value"]
    rest = {key: each for key, each in given.items() if key not in ("from", "value")}
    role = SHAREGPT_ROLES.get(source, source)
    if source != "function_call":
        return {"role": role, "content": value, **rest}
    calls = _parse_json(value)
    return {"role": role, "tool_calls": calls if isinstance(calls, list) else [calls], **rest}


def _read_content(value: Any, name: str, column: str) -> str:
    if not isinstance(value, list):
        return to_text(value, name, column)
    kinds = [str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in value]
    if other := sorted({kind for kind in kinds if kind != "text"}):
        raise DataError(
            f"{name}: {column} is a list of parts, of which {', '.join(other)} can't be trained on; only text can"
        )
    return "".join(to_text(part.get("text"), name, f"{column}.text") for part in value)


def _is_result(content: Any) -> bool:
    """Return whether this is a tool's result that is not yet JSON text; a list may also be one of content parts."""
    if isinstance(content, list):
        return not all(isinstance(part, dict) and "type" in part for part in content)
    return isinstance(content, dict)


def _call(given: Any, name: str, column: str) -> dict[str, Any]:
    function = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{name}: {column}.tool_calls must be a list of {{type: function, function: {{name: ..., "
            f"arguments: ...}}}}, found {str(given)[:80]!r}"
        )
    arguments = function.get("arguments")
    arguments = _parse_json(arguments) if arguments not in (None, "") else {}
    if not isinstance(arguments, dict):
        raise DataError(
            f"{name}: {column}.tool_calls: the arguments of {function['name']!r} must be a JSON object, found "
            f"{str(arguments)[:60]!r}"
        )
    rest = {key: value for key, value in given.items() if key != "function"} if "function" in given else {}
    return {"type": "function", **rest, "function": {**function, "arguments": arguments}}


def _as_function(given: Any) -> dict[str, Any]:
    return {"type": "function", "function": given}


def _parse_json(value: Any) -> Any:
    """Return the value that a text holds as JSON, or the text itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(each) for key, each in value.items() if each is not None}
    return [_drop_nulls(each) for each in value] if isinstance(value, list) else value
