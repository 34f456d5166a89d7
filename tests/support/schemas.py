"""Random JSON schemas whose texts end: every length and number of theirs is bounded."""

from __future__ import annotations

import random
from typing import Any

FORMATS = ("date", "ipv4", "ipv6", "uuid")
PATTERNS = ("^[a-z]{2,4}$", "^(ab|cd)+x?$", "^[0-9]{3}-[0-9]{2}$", "^[A-Z][a-z]*!$")


def make_schema(seed: int) -> dict[str, Any]:
    """Return the schema of a seed."""
    chance = random.Random(seed)
    schema = _make_object(chance, depth=2)
    if chance.random() < 0.3:  # a definition that several places name
        schema["$defs"] = {"part": _make_value(chance, depth=1)}
        schema["properties"]["named"] = {"$ref": "#/$defs/part"}
        schema["properties"]["list"] = {"type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 2}
        schema["required"].append("named")
    return schema


def make_instance(schema: dict[str, Any]) -> Any:
    """Return a value that matches a simple schema."""
    if "enum" in schema or "const" in schema:
        return schema["enum"][0] if "enum" in schema else schema["const"]
    if schema.get("type", "object") == "object":
        return {name: make_instance(each) for name, each in schema.get("properties", {}).items()}
    return {"string": "a text", "boolean": True, "integer": 1, "number": 0.5, "array": [], "null": None}[schema["type"]]


def _make_object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = chance.sample(["id", "name", "city", "ünit", "a b", 'quo"te', "Size_2"], chance.randint(1, 3))
    required = [name for name in names if chance.random() < 0.7]
    properties = {name: _make_value(chance, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _make_value(chance: random.Random, depth: int) -> dict[str, Any]:
    simple = [_make_string, _make_integer, _make_number, _make_constant, _make_enum, _make_pattern, _make_format]
    nested = [_make_object, _make_array, _make_tuple, _make_union] if depth > 0 else []
    at = chance.randrange(len(simple) + len(nested))
    schema = simple[at](chance) if at < len(simple) else nested[at - len(simple)](chance, depth)
    if chance.random() < 0.2:
        schema |= {"description": "what it is", "title": "Its title"}
    return schema


def _make_string(chance: random.Random) -> dict[str, Any]:
    least = chance.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + chance.randint(0, 4)}


def _make_integer(chance: random.Random) -> dict[str, Any]:
    low = chance.randint(-500, 500)
    limits = [("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")][chance.random() < 0.3]
    return {"type": "integer", limits[0]: low, limits[1]: low + chance.randint(2, 300)}


def _make_number(chance: random.Random) -> dict[str, Any]:
    low = chance.randint(-20, 20)
    return {"type": "number", "minimum": low, "maximum": low + chance.randint(1, 9), "multipleOf": 0.25}


def _make_constant(chance: random.Random) -> dict[str, Any]:
    if chance.random() < 0.5:
        return {"const": chance.choice(["x", 5, True, None, ["a", 1]])}
    return {"type": chance.choice(["boolean", "null", ["boolean", "null"]])}


def _make_enum(chance: random.Random) -> dict[str, Any]:
    return {"enum": chance.sample(["red", "green", 'b"lue', 7, -1.5, False, None], chance.randint(1, 4))}


def _make_pattern(chance: random.Random) -> dict[str, Any]:
    return {"type": "string", "pattern": chance.choice(PATTERNS), "maxLength": 9}


def _make_format(chance: random.Random) -> dict[str, Any]:
    return {"type": "string", "format": chance.choice(FORMATS), "maxLength": 40}


def _make_array(chance: random.Random, depth: int) -> dict[str, Any]:
    least = chance.randint(0, 2)
    limits = {"minItems": least, "maxItems": least + chance.randint(0, 2)}
    return {"type": "array", "items": _make_value(chance, depth - 1)} | limits


def _make_tuple(chance: random.Random, depth: int) -> dict[str, Any]:
    items = [_make_value(chance, depth - 1) for _ in range(chance.randint(1, 2))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _make_union(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_make_value(chance, depth - 1) for _ in range(2)]}
