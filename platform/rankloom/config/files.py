"""Config files: a path, or one that comes with rankloom."""

from __future__ import annotations

import difflib
from pathlib import Path

from rankloom.errors import ConfigError
from rankloom.paths import find_shipped_folder

PREFIX = "shipped:"


def is_config_file(name: str) -> bool:
    """Return whether a text names a config file, not an adapter."""
    return name.startswith(PREFIX) or name.endswith((".yaml", ".yml"))


def find_config(name: str) -> Path:
    """Return the file that `name` means: as it is, else `shipped:trials/lora.yaml` or `configs/trials/lora.yaml`.

    Raises:
        ConfigError: there is no such file, neither here nor among those that come with rankloom.
    """
    path, root = Path(name).expanduser(), find_shipped_folder("configs")
    if not name.startswith(PREFIX) and path.is_file():
        return path
    packed = root / name.removeprefix(PREFIX).removeprefix("configs/")
    if packed.is_file() and packed.resolve().is_relative_to(root.resolve()):
        return packed
    known = [str(file.relative_to(root)) for file in sorted(root.rglob("*.yaml"))]
    here = [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    if not name.startswith(PREFIX) and (near := difflib.get_close_matches(path.name, here, n=1)):
        raise ConfigError(f"{name}: no such file; did you mean {path.with_name(near[0])}?")
    if near := difflib.get_close_matches(name.removeprefix(PREFIX), known, n=1):
        raise ConfigError(f"{name}: no such file; did you mean {PREFIX}{near[0]}, which comes with rankloom?")
    raise ConfigError(f"{name}: no such file; with rankloom come {', '.join(PREFIX + each for each in known)}")
