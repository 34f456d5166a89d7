"""Default places on disk, for settings that no config gives; torch-free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


def get_cache_dir() -> Path:
    """Return the folder of converted models and tokenised data: `$RANKLOOM_CACHE`, else `~/.cache/rankloom`.

    The folder is safe to delete.
    """
    return Path(os.environ.get("RANKLOOM_CACHE") or "~/.cache/rankloom").expanduser()


def get_registry_root() -> str:
    """Return the CLI's registry, a folder or URL: `$RANKLOOM_REGISTRY`, else `~/rankloom/registry`."""
    return os.environ.get("RANKLOOM_REGISTRY") or str(Path("~/rankloom/registry").expanduser())


def get_keys_file() -> Path:
    """Return the file of the API keys that the CLI makes: `$RANKLOOM_KEYS`, else `~/rankloom/keys.json`."""
    return Path(os.environ.get("RANKLOOM_KEYS") or "~/rankloom/keys.json").expanduser()


def find_shipped_folder(kind: Literal["configs", "jobs", "serve"]) -> Path:
    """Return a folder that comes with rankloom: in a wheel inside the package, else in the source tree."""
    package = Path(__file__).resolve().parent
    packed = package / "shipped" / kind
    return packed if packed.is_dir() else package.parents[1] / kind
