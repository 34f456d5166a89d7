"""A search space: branches of trial settings, where a leaf may be a knob instead of a value.

    - {method: {type: lora, rank: {choice: [8, 16]}}, optim: {learning_rate: {loguniform: [1.0e-4, 1.0e-2]}}}

A branch is a fragment of a trial; a *point* picks a branch and a value for each of its knobs, by dotted name. Pure and
without torch: `study.py` checks a study with it, `rankloom/search/flat_space.py` passes it to the searchers.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from rankloom.config.base import SHORTHAND, Frozen
from rankloom.config.method import Method
from rankloom.config.plugins import load_external_methods
from rankloom.errors import ConfigError

Tree = dict[str, Any]
Point = dict[str, Any]
"""`branch` (its index) and the values of that branch's knobs by dotted name; or `warm_start` (an index) alone."""

ALPHA_OVER_RANK = "alpha_over_rank"
"""Key of a space's `method` that replaces alpha: alpha = this x rank."""


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def _parse_numbers(value: Any) -> Any:
    """Return a value with its texts that are numbers as numbers: PyYAML reads `1e-4`, a number in YAML 1.2, as text."""
    if isinstance(value, Mapping):
        return {key: _parse_numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_parse_numbers(part) for part in value]
    is_number = isinstance(value, str) and _EXPONENT.fullmatch(value) and math.isfinite(float(value))
    return float(value) if is_number else value


class Choice(Frozen):
    """One of these values; each may be a whole section of settings."""

    choice: Annotated[list[Annotated[Any, BeforeValidator(_parse_numbers)]], Field(min_length=1)]

    def ends(self) -> list[Any]:
        """Return the values that decide whether the knob's whole range is allowed."""
        return self.choice


class _Range(Frozen):
    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_order(self) -> _Range:
        low, high = self.bounds
        if not low < high:
            raise ConfigError(f"expected [low, high] with low < high, given [{low:g}, {high:g}]")
        return self

    def ends(self) -> list[Any]:
        """Return the two bounds, which decide whether the whole range is allowed."""
        return list(self.bounds)


class Uniform(_Range):
    """A number between two."""

    uniform: tuple[float, float]

    @property
    def bounds(self) -> tuple[float, float]:
        return self.uniform


class LogUniform(_Range):
    """A number between two, each order of magnitude as likely as another."""

    loguniform: tuple[Annotated[float, Field(gt=0)], float]

    @property
    def bounds(self) -> tuple[float, float]:
        return self.loguniform


class RandInt(_Range):
    """A whole number between two, both included."""

    randint: tuple[int, int]

    @property
    def bounds(self) -> tuple[int, int]:
        return self.randint


Knob = Choice | Uniform | LogUniform | RandInt
_KNOBS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(cls) for cls in get_args(Knob) for name in cls.model_fields
}  # fmt: skip


def find_knobs(branch: Mapping[str, Any], path: str = "") -> dict[str, Knob]:
    """Return dotted name -> knob, in the order of the YAML.

    Raises:
        ConfigError: a knob is malformed.
    """
    knobs: dict[str, Knob] = {}
    for key, value in branch.items():
        name = f"{path}{key}"
        if not isinstance(value, Mapping):
            continue
        if kinds := [kind for kind in value if kind in _KNOBS]:
            knobs[name] = _parse_knob(name, kinds[0], value)
        elif (kind := _guess_knob(value)) is not None:
            raise ConfigError(f"{name}: unknown {next(iter(value))!r}; did you mean {kind!r}?")
        else:
            knobs |= find_knobs(value, f"{name}.")
    return knobs


def _guess_knob(value: Mapping[str, Any]) -> str | None:
    """Return the knob that a mapping looks like: one key with a list, and nearly the name of a knob."""
    if len(value) != 1 or not isinstance(next(iter(value.values())), list):
        return None
    return next(iter(difflib.get_close_matches(str(next(iter(value))), _KNOBS, n=1)), None)


def _parse_knob(name: str, kind: str, value: Mapping[str, Any]) -> Knob:
    if len(value) > 1:
        raise ConfigError(f"{name}: expected {kind} alone, found {', '.join(map(str, value))}")
    try:
        knob: Knob = _KNOBS[kind].validate_python(dict(value))
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        reason = cause if isinstance(cause, ConfigError) else f"{first['msg']} (given {value[kind]!r})"
        raise ConfigError(f"{name}.{kind}: {reason}") from None
    return knob


def place(tree: Mapping[str, Any], values: Mapping[str, Any]) -> Tree:
    """Return a copy of a branch with each knob replaced by its value."""
    result: Tree = {key: place(value, {}) if isinstance(value, Mapping) else value for key, value in tree.items()}
    for name, value in values.items():
        node, *path = result, *name.split(".")
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = value
    return result


def merge(base: Mapping[str, Any], fragment: Mapping[str, Any]) -> Tree:
    """Return `base` updated with `fragment`'s settings; a section of another `type` replaces the base's section."""
    result: Tree = dict(base)
    for key, value in fragment.items():
        old = result.get(key)
        if isinstance(old, str) and key in SHORTHAND:
            old = {SHORTHAND[key]: old}
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        if both and ("type" not in value or value["type"] == old.get("type", value["type"])):  # type: ignore[union-attr]
            result[key] = merge(old, value)  # type: ignore[arg-type]
        else:
            result[key] = value
    return result


def resolve_alpha(tree: Tree) -> Tree:
    """Return the tree with `method.alpha_over_rank` replaced by alpha."""
    method = tree.get("method")
    if not isinstance(method, Mapping) or ALPHA_OVER_RANK not in method:
        return tree
    settings = dict(method)
    ratio = settings.pop(ALPHA_OVER_RANK)
    rank = settings.get("rank", _read_default_rank(settings.get("type")))
    if rank is None:
        raise ConfigError(
            f"method.{ALPHA_OVER_RANK}: {settings.get('type')} does not have both alpha and rank; remove it"
        )
    if not isinstance(ratio, (int, float)) or not isinstance(rank, int):
        raise ConfigError(f"method.{ALPHA_OVER_RANK}: expected numbers (given {ratio!r}, with rank {rank!r})")
    return tree | {"method": settings | {"alpha": float(ratio) * rank}}


def _read_default_rank(kind: Any) -> int | None:
    """Return the default rank of a method that has alpha and rank, else None."""
    for cls in (*get_args(get_args(Method)[0]), *load_external_methods()):
        if cls.model_fields["type"].default == kind and {"alpha", "rank"} <= cls.model_fields.keys():
            return int(cls.model_fields["rank"].default)
    return None


CROSSED = ("model", "quantization", "data", "compute")
"""Sections that change the base or the data; a study must know all their combinations."""
KINDS = (
    *("method", "method.type", "method.target_modules", "method.experts", "method.optimizer", "method.layerwise"),
    *("optim", "optim.loraplus_ratio"),
)
"""Knobs that change the method, or whose values take more or less memory in no order."""
RISING = ("method.rank", "method.initial_rank", "method.num_layers", "optim.batch_size")
"""Knobs whose highest value takes most memory."""
FALLING = ("optim.accumulation",)
"""Knobs whose lowest value takes most memory."""


def probe_knobs(knobs: Mapping[str, Knob]) -> Iterator[dict[str, Any]]:
    """Yield points with one knob at each of its ends and the others at their first, to find every typo before a run.

    Knobs of `CROSSED` sections take every combination of their ends. One of the points needs most memory.
    """
    first = {name: knob.ends()[0] for name, knob in knobs.items()}
    crossed = {name: knob for name, knob in knobs.items() if name.partition(".")[0] in CROSSED}
    for values in itertools.product(*(knob.ends() for knob in crossed.values())):
        yield first | dict(zip(crossed, values, strict=True))
    for name, knob in knobs.items():
        for value in knob.ends()[1:] if name not in crossed else ():
            yield first | {name: value}
    heaviest = {name: max(knobs[name].ends(), key=float) for name in RISING if name in knobs}
    heaviest |= {name: min(knobs[name].ends(), key=float) for name in FALLING if name in knobs}
    kinds = crossed | {name: knobs[name] for name in KINDS if name in knobs}
    if heaviest or kinds != crossed:
        for values in itertools.product(*(knob.ends() for knob in kinds.values())):
            yield first | heaviest | dict(zip(kinds, values, strict=True))


def walk_grid(knobs: Mapping[str, Knob]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the knobs' values.

    Raises:
        ConfigError: a knob has infinitely many values.
    """
    axes = []
    for name, knob in knobs.items():
        if not isinstance(knob, (Choice, RandInt)):
            raise ConfigError(f"{name}: grid search needs choice or randint here; list the values to try")
        axes.append(knob.choice if isinstance(knob, Choice) else range(knob.randint[0], knob.randint[1] + 1))
    for values in itertools.product(*axes):
        yield dict(zip(knobs, values, strict=True))


def count_grid(knobs: Mapping[str, Knob]) -> int:
    """Return the number of combinations that `walk_grid` yields."""
    sizes = [len(k.choice) if isinstance(k, Choice) else k.bounds[1] - k.bounds[0] + 1 for k in knobs.values()]
    return math.prod(int(size) for size in sizes)
