"""Parse a body's bytes into a request, or report its first mistake, in time bounded by the body's length.

A large body must not hold up other requests: each call into C here is short, even for the worst 2 MB, because it holds
the interpreter's lock. So what would create the most objects is counted before it is parsed.
"""

from __future__ import annotations

import difflib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from rankloom.gateway.openai.body import TAGS
from rankloom.gateway.openai.errors import WireError

SMALL = 32 * 1024
"""Bytes of a body that is parsed faster than a thread starts."""
MOST_PARTS, MOST_VALUES = 2**16, 2**18
"""Texts, keys, lists and objects of a body; the same with numbers, of which there are more where prompts are tokens."""
_INSTEAD = {
    "role function": "give what it returned in a message of role tool",
    "functions": "give them as tools",
    "function_call": "give tool_choice, or in a message tool_calls",
    "logit_bias": "structured_outputs.choice holds an answer to given texts",
    "reasoning_effort": "ask for it in a message",
    "verbosity": "ask for it in a message",
    "refusal": "put it into the message's content",
    "audio": "only text is read and written here",
    "modalities": "only text is read and written here",
    "store": "no answer is kept here",
    "previous_response_id": "no answer is kept here; give the conversation as input",
    "conversation": "no conversation is kept here; give it as input",
    "background": "no answer is kept here",
    "prompt": "no prompts are kept here; give instructions and input",
    "truncation": "shorten the input",
    "moderation": "nothing is moderated here",
    "web_search_options": "nothing is searched here",
    "suffix": "put it into the prompt",
    "echo": "put the prompt before the answer yourself",
}
"""What to do in place of one of OpenAI's keys that is not supported."""

BodyT = TypeVar("BodyT", bound=BaseModel)


def read(kind: type[BodyT], body: bytes) -> BodyT:
    """Parse a body into a request.

    Raises:
        WireError: reports the first mistake.
    """
    if len(body) > SMALL:
        _check_parts(body)
    try:
        tree = from_json(body.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise WireError(400, f"The body is not valid JSON: {error}.") from None
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # no more than one for each key of the kind: lists end at the first, and so do keys that are not known
        detail = error.errors(include_url=False)[0]
    raise _explain(kind, detail)


def _check_parts(body: bytes) -> None:
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    parts = unescaped.count(b'"') // 2
    if parts <= MOST_PARTS:
        outside = b"".join(unescaped.split(b'"')[::2])
        parts += outside.count(b"[") + outside.count(b"{")
        if outside.count(b",") >= MOST_VALUES:
            raise WireError(400, f"The body has more than {MOST_VALUES} values; ask in several requests.")
    if parts > MOST_PARTS:
        raise WireError(
            400, f"The body has more than {MOST_PARTS} keys, texts, lists and objects; ask in several requests."
        )


def _explain(kind: type[BaseModel], detail: ErrorDetails) -> WireError:
    """Explain one of pydantic's errors in one line: the key, what is allowed, what was given, what to do."""
    context, value = detail.get("ctx", {}), detail["input"]
    where = [str(part)[:64] for part in detail["loc"] if part not in TAGS]
    where += [context["key"]] if detail["type"] == "of_key" else []
    key = where[-1] if where else ""
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, kind.model_fields, n=1, cutoff=0.7) if len(where) == 1 else []
        context = {"hint": f"did you mean {near[0]}?" if near else "leave it out"}
    text = _describe_allowed(detail["type"], detail["msg"], context)
    given = "" if detail["type"] in _WITHOUT_VALUE else f" (given {_quote(value)})"
    about = [*([f"role {value}"] if key == "role" and isinstance(value, str) else []), key, *where[:1]]
    hints = [_INSTEAD[name] for name in about if name in _INSTEAD and detail["type"] != "missing"]
    hint = f"; {hints[0]}" if hints else ""
    return WireError(400, f"{'.'.join(where) or 'body'}: {text}{given}{hint}", param=where[0] if where else None)


_WITHOUT_VALUE = {"of_key", "extra_forbidden", "missing", "too_long", "too_short", "long_texts", "string_too_long"}


def _describe_allowed(kind: str, text: str, context: dict[str, Any]) -> str:
    match kind:
        case "missing":
            return "required, but not given"
        case "extra_forbidden":
            return f"unknown key; {context['hint']}"
        case "none_required":
            return "not supported; leave it out"
        case "literal_error":
            return f"only {context['expected'].replace('True', 'true').replace('False', 'false')}"
        case "too_long" | "string_too_long" if context["max_length"] == 0:
            return "not supported; leave it out"
        case "too_long":
            return f"at most {context['max_length']} (given {context['actual_length']})"
        case "too_short":
            return f"at least {context['min_length']} (given {context['actual_length']})"
        case "string_too_long":
            return f"at most {context['max_length']} characters"
        case "string_too_short":
            return f"at least {context['min_length']} character(s)"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "expected an object"
        case "list_type":
            return "expected a list"
        case "string_type":
            return "expected a text"
        case "int_type" | "int_from_float":
            return "expected a whole number"
        case "float_type":
            return "expected a number"
        case "bool_type":
            return "expected true or false"
    return text.removeprefix("Value error, ").replace("Input should be", "must be")


def _quote(value: Any) -> str:
    """Return a value, or its beginning, as JSON."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value[:40] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
