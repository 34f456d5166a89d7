"""The base of every config class: frozen, strict on keys, loaded from YAML with dotted overrides.

`load` reads a file, `parse` a mapping, and a class is called as any other: each turns pydantic's errors into lines that
name the key, the value, what is allowed and the nearest known key. No module of `rankloom.config` imports torch or ray.
Read `trial.py` next.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, Union, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails

from rankloom.config.files import find_config
from rankloom.errors import ConfigError, IncompatibleError


class Frozen(BaseModel):
    """An immutable config node; the docstring under a field is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
    renamed: ClassVar[Mapping[str, str]] = {}
    """Key of an earlier version -> its present name, which the error for the old key gives."""

    if not TYPE_CHECKING:  # type checkers derive each class's arguments from its fields

        def __init__(self, /, **settings: Any) -> None:
            """Raises ConfigError where a setting is wrong, as `parse` does."""
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise to_config_error(type(self), error, type(self).__name__) from None

        # else pydantic would call it for nested mappings too, and lose where in the whole an error is
        __init__.__pydantic_base_init__ = True

    @model_validator(mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, tree: Any) -> Any:
        """Raise ConfigError for `batch_size: true`, which pydantic would read as 1."""
        for name, value in tree.items() if isinstance(tree, Mapping) else ():
            if isinstance(value, bool) and name in cls.model_fields and _is_number(cls.model_fields[name].annotation):
                raise ConfigError(f"{name}: expected a number (given {value!r})")
        return tree


ConfigT = TypeVar("ConfigT", bound=Frozen)


def load(cls: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, apply `key.path=value` overrides and validate.

    Args:
        path: a file; as a text also one that comes with rankloom, such as `shipped:trials/lora.yaml`.

    Raises:
        ConfigError: the file, a key or a value is wrong.
        IncompatibleError: two settings exclude each other.
    """
    file = find_config(path) if isinstance(path, str) else path
    return parse(cls, apply_overrides(read_yaml(file), overrides), str(file))


def parse(cls: type[ConfigT], tree: Mapping[str, Any], origin: str = "config") -> ConfigT:
    """Validate a plain mapping; the error names `origin`."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise to_config_error(cls, error, origin) from None


def coerce(cls: type[ConfigT], given: ConfigT | str | Path | Mapping[str, Any]) -> ConfigT:
    """Return the config that `given` is: itself, a YAML file's, or a mapping's."""
    if isinstance(given, cls):
        return given
    if isinstance(given, (str, Path)):
        return load(cls, given)
    if isinstance(given, Mapping):
        return parse(cls, given, cls.__name__)
    raise ConfigError(f"expected a {cls.__name__}, the path of a YAML file or a dict (given {given!r})")


def to_config_error(cls: type[BaseModel], error: ValidationError, origin: str) -> ConfigError:
    """Return one error for all of pydantic's complaints; `origin` begins it."""
    details = error.errors()
    lines = [_explain(cls, detail) for detail in details]
    causes = [detail.get("ctx", {}).get("error") for detail in details]
    kind = IncompatibleError if any(isinstance(cause, IncompatibleError) for cause in causes) else ConfigError
    return kind(f"{origin}: " + "\n".join(dict.fromkeys(lines)))


def dump(config: Frozen) -> dict[str, Any]:
    """Return the config as plain data that `parse` reads back."""
    return config.model_dump(mode="json")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML mapping.

    Raises:
        ConfigError: the file is missing, is not a YAML mapping, or has a key twice.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        near = difflib.get_close_matches(file.name, _list_siblings(file), n=1)
        raise ConfigError(f"{path}: no such file" + (f"; did you mean {file.with_name(near[0])}?" if near else ""))
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `tree` with each `key.path=value` applied; values are read as YAML."""
    result: dict[str, Any] = _copy(tree)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: expected key=value, for example optim.learning_rate=1e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: {' '.join(str(error).split())}") from None
        node, *rest = result, *key.split(".")
        for at, part in enumerate(rest[:-1]):
            if isinstance(node.get(part), list):
                name = ".".join(rest[: at + 1])
                raise ConfigError(f"override {override!r}: {name} is a list; give it whole, as {name}=[...]")
            if not isinstance(node.get(part), dict):
                # expand a scalar shorthand (`quantization: nf4`, `data.train: file.csv`) before one part of it changes
                old = node.get(part)
                node[part] = {SHORTHAND[part]: old} if part in SHORTHAND and isinstance(old, str) else {}
            node = node[part]
        node[rest[-1]] = value
    return result


SHORTHAND = {
    "model": "id",
    "quantization": "type",
    "engine": "type",
    "base": "id",
    "train": "path",
    "validation": "path",
    "test": "path",
    "retention": "path",
}
"""Settings that may be given as one string -> the key that the string sets."""


@dataclass(frozen=True)
class OpenUnion:
    """Marks a union of config classes, discriminated by `type`, to which other packages may add members."""

    more: Callable[[], tuple[type[BaseModel], ...]]
    """Called when a config with this union is first validated."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        members = (*get_args(source), *self.more())
        return handler.generate_schema(Annotated[Union[members], Field(discriminator="type")])  # noqa: UP007


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else repr(key))
        return super().construct_mapping(node, deep)


def _list_siblings(file: Path) -> list[str]:
    return [p.name for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []


def _copy(tree: Any) -> Any:
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _explain(cls: type[BaseModel], detail: ErrorDetails) -> str:
    """Return one line for one of pydantic's errors."""
    cause = detail.get("ctx", {}).get("error")
    # inside a tagged union pydantic's location also holds the tag, which is not one of the user's keys
    keys, models = _walk(cls, detail["loc"])
    known = {name for model in models for name in model.model_fields}
    path = ".".join(keys) or "the config"
    value = detail["input"]
    shown = f" (given {value!r})" if not isinstance(value, (dict, BaseModel)) and detail["type"] != "missing" else ""
    if detail["type"] == "extra_forbidden":
        renamed = {old: new for model in models if issubclass(model, Frozen) for old, new in model.renamed.items()}
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        if keys[-1] in renamed:
            hint = f"it is called {renamed[keys[-1]]!r} now"
        return f"{path}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{path}: required, but not given"
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        expected = detail["ctx"].get("expected_tags", "")
        given = detail["ctx"].get("tag")
        if given is None:
            return f"{path}.type: required, but not given; allowed: {', '.join(_list_tags(cls, detail['loc']))}"
        return f"{path}.type: unknown type {given!r}; {_TYPE_HINTS.get(str(given), f'allowed: {expected}')}"
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{path}: expected a mapping of settings{shown}"
    if isinstance(cause, ConfigError):
        return f"{path}: {cause}" if keys else str(cause)
    return f"{path}: {detail['msg'].removeprefix('Value error, ')}{shown}"


_TYPE_HINTS = {
    "qlora": "QLoRA is `method: {type: lora}` with `quantization: nf4`",
    "qdora": "QDoRA is `method: {type: dora}` with `quantization: nf4`",
    "lora+": "LoRA+ is `method: {type: lora}` with `optim.loraplus_ratio: 16`",
    "loraplus": "LoRA+ is `method: {type: lora}` with `optim.loraplus_ratio: 16`",
    "rslora": "rsLoRA is `method: {type: lora, rslora: true}`",
}


def _list_tags(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Return the `type`s of the tagged union at `loc`."""
    return [repr(tag) for model in _walk(cls, loc)[1] if (tag := _read_tag(model))]


def _walk(cls: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """Return the user's keys along `loc` (without union tags), and the config classes allowed at its end."""
    keys: list[str] = []
    models: list[type[BaseModel]] = [cls]
    for part in map(str, loc):
        tagged = [m for m in models if _read_tag(m) == part or m.__name__ == part]
        if tagged and (len(models) > 1 or part not in models[0].model_fields):
            models = tagged
            continue
        known = sorted({name for m in models for name in m.model_fields})
        if part in known or part == str(loc[-1]) or part.isdigit():
            keys.append(part)
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if fields:
            models = [m for field in fields for m in _list_models(field)] or models
    return keys, models


def is_whole_number(cls: type[BaseModel], name: str) -> bool:
    """Return whether the setting with this dotted name takes only whole numbers."""
    *path, last = name.split(".")
    fields = [m.model_fields[last].annotation for m in _walk(cls, tuple(path))[1] if last in m.model_fields]
    kinds = {kind for annotation in fields for kind in _list_kinds(annotation)}
    return int in kinds and float not in kinds


def _list_kinds(annotation: Any) -> list[Any]:
    """Return the types inside an annotation's unions and bounds."""
    return [kind for part in get_args(annotation) for kind in _list_kinds(part)] or [annotation]


def _read_tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    return str(get_args(field.annotation)[0]) if field and get_args(field.annotation) else None


def _is_number(annotation: Any) -> bool:
    """Return whether an annotation is int, float, or one of them with bounds or None."""
    parts = [part for part in get_args(annotation) if part is not type(None) and not isinstance(part, FieldInfo)]
    return annotation in (int, float) or (len(parts) == 1 and _is_number(parts[0]))


def _list_models(field: FieldInfo) -> list[type[BaseModel]]:
    more = [model for mark in field.metadata if isinstance(mark, OpenUnion) for model in mark.more()]
    return [*_find_models(field.annotation), *more]


def _find_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _find_models(arg)]
