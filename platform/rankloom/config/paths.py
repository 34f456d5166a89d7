"""Settings that hold paths: marked on their fields, and found by one walk over a config's tree.

Workers run in folders of their own, perhaps on other machines: `resolve_paths` makes local paths absolute, and
`list_local_inputs` lists those that another machine would not find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from rankloom.config.base import SHORTHAND, ConfigT, dump, parse


@dataclass(frozen=True)
class IsPath:
    """Marks a setting whose value is a local path or a URL: `Annotated[str, IsPath()]`."""

    or_id: bool = False
    """The value may also name something else; it is a path only if there is a file or folder."""
    is_output: bool = False
    """The path is written to, not read."""


@dataclass(frozen=True)
class IsFragment:
    """Marks a plain mapping that holds a part of such a config, with knobs for some of its values."""

    cls: type[BaseModel]


Change = Callable[[str, str, IsPath], str]
"""Maps the dotted name of a setting, its value and its mark to the new value."""


def resolve_paths(config: ConfigT) -> ConfigT:
    """Return the config with its local paths absolute."""

    def resolve(_: str, path: str, mark: IsPath) -> str:
        return resolve_path(path, or_id=mark.or_id)

    return parse(type(config), map_paths(type(config), dump(config), resolve))


def resolve_path(path: str, *, or_id: bool = False) -> str:
    """Return a local path as an absolute one; a URL, or an id that is not a path here, as it is."""
    local = Path(path.removeprefix("file://")).expanduser()
    is_url = "://" in path and not path.startswith("file://")
    return path if is_url or (or_id and not local.exists()) else str(local.absolute())


def list_local_inputs(config: BaseModel) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the value of each setting that names a file or folder of this machine to read."""
    found: dict[tuple[str, str], None] = {}

    def collect(key: str, path: str, mark: IsPath) -> str:
        if not mark.is_output and Path(path).expanduser().exists():
            found[key, path] = None
        return path

    map_paths(type(config), config.model_dump(mode="json"), collect)
    yield from found


def map_paths(cls: type[BaseModel], tree: Mapping[str, Any], change: Change, prefix: str = "") -> dict[str, Any]:
    """Return the tree of a `cls`, or a fragment of one, with each of its paths changed."""
    result = dict(tree)
    for name, field in cls.model_fields.items():
        if name in tree:
            annotation = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
            result[name] = _map_value(annotation, tree[name], f"{prefix}{name}", change)
    return result


def _map_value(annotation: Any, value: Any, key: str, change: Change) -> Any:
    parts = list(_walk_parts(annotation))
    models = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    if isinstance(value, list):
        return [_map_value(annotation, item, key, change) for item in value]
    if isinstance(value, str):
        mark = next((part for part in parts if isinstance(part, IsPath)), None)
        if mark is not None:
            return change(key, value, mark)
        inner = SHORTHAND.get(key.rpartition(".")[2])
        for model in models:
            if inner in model.model_fields:
                return map_paths(model, {inner: value}, change, f"{key}.")[inner]
    if isinstance(value, dict):
        if value.keys() == {"choice"}:
            return {"choice": _map_value(annotation, value["choice"], key, change)}
        models += [part.cls for part in parts if isinstance(part, IsFragment)]
        named = next((part for part in parts if get_origin(part) is dict), None)
        if named is not None and not models:
            item = get_args(named)[1]
            return {name: _map_value(item, each, f"{key}.{name}", change) for name, each in value.items()}
        for model in models:
            value = map_paths(model, value, change, f"{key}.")
    return value


def _walk_parts(annotation: Any) -> Iterator[Any]:
    """Yield the types and marks in an annotation: members of unions, items of lists; mappings as they are."""
    yield annotation
    if get_origin(annotation) is not dict:
        for part in get_args(annotation):
            yield from _walk_parts(part)
