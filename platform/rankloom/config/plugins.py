"""Methods of other packages, found through the entry-point group `rankloom.methods`; no torch.

An entry point names a method's config class, which has everything else: its row of the compatibility table, its memory
terms, and where its implementation is. See CONTRIBUTING.md.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

from rankloom.config.compatible import COMPATIBLE, Compatibility
from rankloom.errors import ConfigError

GROUP = "rankloom.methods"


@cache
def load_external_methods() -> tuple[type[Any], ...]:
    """Return the config classes of methods that other packages bring; a package that is broken is warned of.

    Raises:
        ConfigError: two methods have one name.
    """
    found: dict[str, type[Any]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (_read_package(point), point.name)):
        try:
            cls = _check(point.load())
        except Exception as error:  # of another package's import, which may raise anything
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"{_read_package(point)}: its method {point.name!r} is left out: {reason}", stacklevel=2)
            continue
        name = cls.model_fields["type"].default
        if name in COMPATIBLE or name in found:
            other = "rankloom" if name in COMPATIBLE else found[name].__module__
            raise ConfigError(
                f"{_read_package(point)}: its method's type {name!r} is {other}'s already; rename or uninstall it"
            )
        found[name] = cls
    return tuple(found.values())


def _check(cls: Any) -> type[Any]:
    from rankloom.config.method import AdapterConfig, FullRankConfig

    if not isinstance(cls, type) or not issubclass(cls, (AdapterConfig, FullRankConfig)):
        raise TypeError(f"expected a subclass of AdapterConfig or FullRankConfig, not {cls!r}")
    field = cls.model_fields.get("type")
    if field is None or get_args(field.annotation) != (field.default,):
        raise TypeError(f"{cls.__name__} needs a field `type: Literal[...]` with its one value as the default")
    if not isinstance(cls.compatible, Compatibility):
        raise TypeError(f"{cls.__name__}.compatible: expected a Compatibility, not {cls.compatible!r}")
    if cls.compatible.fusable:
        raise TypeError(f"{cls.__name__}.compatible: fusable has to be False; hosts train lora and dora alone")
    if not cls.implementation.partition(":")[2]:
        raise TypeError(f"{cls.__name__}.implementation: expected module:Class, not {cls.implementation!r}")
    return cls


def _read_package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
