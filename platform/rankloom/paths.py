"""Where things live on disk when no config says so; torch-free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


def cache_dir() -> Path:
    """Converted models and tokenised data: `$RANKLOOM_CACHE`, else `~/.cache/rankloom`. Safe to delete."""
    return Path(os.environ.get("RANKLOOM_CACHE") or "~/.cache/rankloom").expanduser()


def registry_root() -> str:
    """The registry that the CLI reads: `$RANKLOOM_REGISTRY`, else `~/rankloom/registry`; may be an s3:// URL."""
    return os.environ.get("RANKLOOM_REGISTRY") or str(Path("~/rankloom/registry").expanduser())


def keys_file() -> Path:
    """The API keys that the CLI makes: `$RANKLOOM_KEYS`, else `~/rankloom/keys.json`."""
    return Path(os.environ.get("RANKLOOM_KEYS") or "~/rankloom/keys.json").expanduser()


def shipped(kind: Literal["configs", "jobs", "serve"]) -> Path:
    """The folder of that name which comes with rankloom: inside the package in a wheel, else in the source tree."""
    package = Path(__file__).resolve().parent
    packed = package / "shipped" / kind
    return packed if packed.is_dir() else package.parents[1] / kind
