"""Checks an adapter's folder: what it may hold, and whether it still matches its record. No weights are loaded.

Weights are safetensors only: a pickle runs code when it is read. `read_folder` checks a folder before it is published,
`find_files` one outside a registry, `check_files` one with a record.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rankloom.errors import RegistryError
from rankloom.registry.record import FILE_PATTERN, Record, StoredFile

RECORD = "record.json"
CARD = "README.md"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Prefix of each module's name in a PEFT folder's tensors."""

MAX_CONFIG_BYTES = 2**24

ALLOWED = frozenset({".json", ".safetensors", ".md", ".txt", ".yaml", ".jinja"})
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"})


def read_folder(folder: Path) -> dict[str, Path]:
    """Return the files of a publishable adapter folder: name -> path.

    Raises:
        RegistryError: a file of the adapter is missing, or a file must not be published.
    """
    if not folder.is_dir():
        raise RegistryError(f"{folder}: no such folder; give a folder that PEFT's save_pretrained wrote")
    entries = sorted(folder.iterdir())
    problems = [reason for entry in entries if (reason := _find_refusal(entry))]
    problems += [
        f"{needed} is missing; PEFT's save_pretrained writes it"
        for needed in (CONFIG, WEIGHTS)
        if needed not in {entry.name for entry in entries}
    ]
    _raise_any(f"{folder} can't be published", problems)
    return {entry.name: entry for entry in entries}


def find_files(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Find some files of any adapter folder, whatever else it holds: name -> regular file.

    A link is followed if it stays in the folder, or leads to the blobs of the hub cache that the folder is in.

    Raises:
        RegistryError: a file is missing, or is not a regular file.
    """
    if not folder.is_dir():
        raise RegistryError(f"{folder}: no such folder; give a folder that PEFT's save_pretrained wrote")
    home = folder.resolve()
    files, problems = {}, []
    for name in names:
        entry = home / name
        target = Path(os.path.realpath(entry))
        if not os.path.lexists(entry):
            problems.append(_explain_missing(home, name))
        elif target.parent not in (home, home.parent.parent / "blobs"):
            problems.append(f"{name} is a link out of the folder; put the file itself there")
        elif not target.is_file():
            problems.append(f"{name} is not a regular file")
        files[name] = target
    _raise_any(f"{folder} can't be published", problems)
    return files


def _explain_missing(folder: Path, name: str) -> str:
    if name == WEIGHTS and (folder / "adapter_model.bin").exists():
        return (
            f"{name} is missing, and adapter_model.bin is a pickle, which can run code: load it with PEFT if you "
            f"trust it, and save it with save_pretrained(..., safe_serialization=True)"
        )
    if name == CONFIG:
        others = sorted({*folder.glob(f"*/{CONFIG}"), *folder.glob(f"snapshots/*/{CONFIG}")})
        if others:
            near = ", ".join(str(file.parent.relative_to(folder)) for file in others[:5])
            return f"{name} is missing; there is one in {near}: give that folder"
    return f"{name} is missing" + ("; PEFT's save_pretrained writes it" if name in (CONFIG, WEIGHTS) else "")


def read_config(file: Path) -> dict[str, Any]:
    """Read an adapter_config.json, without checking its settings.

    Raises:
        RegistryError: it can't be read, is too large, or is not a JSON object with a peft_type.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise RegistryError(f"{file} is larger than an adapter's config may be ({MAX_CONFIG_BYTES:,} bytes)")
        tree = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RegistryError(f"{file} is not JSON: {error}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("peft_type"), str):
        raise RegistryError(f"{file} has no peft_type; it is not a PEFT config")
    return tree


@contextmanager
def rename_in_errors(folder: Path, name: str) -> Iterator[None]:
    """Replace a temporary folder by `name`, which the reader knows, in the text of RegistryErrors."""
    try:
        yield
    except RegistryError as error:
        raise RegistryError(str(error).replace(str(folder), name)) from None


def check_contents(folder: Path, names: Iterable[str]) -> None:
    """Raise RegistryError if an adapter_config.json or safetensors file among `names` is unreadable."""
    problems = []
    for name in sorted(names):
        if name == CONFIG:
            problems += _find_config_problems(folder / name)
        elif name.endswith(".safetensors"):
            problems += _find_safetensors_problems(folder / name)
    _raise_any(f"{folder} is not a valid adapter", problems)


def check_files(folder: Path, record: Record) -> None:
    """Check that a folder has the files, sizes and checksums of its record, and readable contents.

    Raises:
        RegistryError: lists every difference.
    """
    entries = {entry.name: entry for entry in folder.iterdir() if entry.name != RECORD}
    problems = [f"{name} is missing" for name in sorted(set(record.files) - set(entries))]
    problems += [f"{name} is not in the record" for name in sorted(set(entries) - set(record.files))]
    for name in sorted(set(entries) & set(record.files)):
        if reason := _find_refusal(entries[name]):
            problems.append(reason)
            continue
        stored, expected = describe(entries[name]), record.files[name]
        if stored.bytes != expected.bytes:
            problems.append(f"{name} has {stored.bytes} bytes; its record says {expected.bytes}")
        elif stored.sha256 != expected.sha256:
            problems.append(f"{name} has another checksum than its record says: {stored.sha256}")
    problems += [f"the record names no {needed}" for needed in (CONFIG, WEIGHTS) if needed not in record.files]
    _raise_any(f"{record.ref} is broken", problems)
    check_contents(folder, record.files)


def describe(file: Path) -> StoredFile:
    """Return a file's size and checksum."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
        return StoredFile(bytes=opened.tell(), sha256=digest.hexdigest())


def _find_refusal(entry: Path) -> str | None:
    name = entry.name[:200]
    if entry.is_symlink():
        return f"{name} is a symbolic link; put the file itself there"
    if entry.is_dir():
        return f"{name}/ is a subfolder; an adapter is one flat folder"
    if not entry.is_file():
        return f"{name} is not a regular file"
    if entry.suffix.lower() in PICKLES:
        return f"{name} may hold a pickle, which can run code; only .safetensors weights are allowed: remove it"
    if entry.suffix.lower() not in ALLOWED or not re.fullmatch(FILE_PATTERN, entry.name):
        return f"{name!r} does not belong in an adapter; allowed are {', '.join(sorted(ALLOWED))}: remove it"
    return None


def _find_config_problems(file: Path) -> list[str]:
    try:
        read_config(file)
    except RegistryError as error:
        return [str(error).removeprefix(f"{file.parent}{os.sep}")]
    return []


def _find_safetensors_problems(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="numpy") as opened:
            empty = not opened.keys()
    except (SafetensorError, OSError) as error:
        return [f"{file.name} is corrupt or truncated: {error}"]
    return [f"{file.name} holds no tensor"] if empty else []


def _raise_any(subject: str, problems: list[str]) -> None:
    if problems:
        raise RegistryError(f"{subject}: " + "; ".join(problems))
