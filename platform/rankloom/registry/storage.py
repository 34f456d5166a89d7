"""Storage that makes a version's files visible atomically: `LocalStorage` on a disk, `ObjectStorage` on S3 and alike.

Both keep `<name>/<number>/<file>` and `<name>/aliases.json`; a version exists if and only if its record.json does.

- Local: a version is staged in a hidden folder beside its target, synced, and renamed; writers of one name take turns
  through a lock file. Leftovers found under the lock belong to dead writers, so the next writer removes them.
- Object stores have neither rename nor lock, and pyarrow no conditional put. A writer claims a number with an
  object of its own, lists the number's folder and continues only if it sees nothing but its claim, so at most one of
  two writers continues (S3, GCS, MinIO and Azure guarantee that a listing after a put shows it). It uploads
  record.json last. Aliases have no such guard: of two promotions in the same instant the later put wins, and the
  earlier may be missing from the alias's history.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from filelock import FileLock
from pyarrow import fs

from rankloom.errors import ConfigError, RegistryError
from rankloom.registry.checks import RECORD

LOCK_TIMEOUT_S = 60.0
ABANDONED_AFTER = timedelta(days=1)
"""Age from which an unfinished upload to an object store counts as dead."""

_STAGED = ".publishing-"
_CLAIM = ".claim-"
_HIDDEN = (_STAGED, _CLAIM, ".writing-", ".lock")


class Storage(Protocol):
    """Operations on a registry's files; paths are relative to its root, with `/`."""

    def list_folders(self, path: str) -> list[str]:
        """Return the names of the folders in `path`; none if it does not exist."""

    def list_files(self, path: str) -> list[str]:
        """Return the names of the files in `path`, without those that the storage itself keeps there."""

    def exist(self, paths: list[str]) -> list[bool]: ...

    def read(self, path: str) -> bytes: ...

    def download(self, path: str, target: Path) -> None: ...

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a small file atomically."""

    def delete(self, path: str) -> None: ...

    def lock(self, name: str) -> AbstractContextManager[object]:
        """Lock `name` while its versions or aliases change."""

    def stage(self, name: str) -> AbstractContextManager[Path]:
        """Provide an empty local folder to prepare a version in; call it under the lock."""

    def commit(self, staged: Path, name: str, number: int) -> bool:
        """Make `staged` visible as `<name>/<number>`; return False if another writer took the number."""


def open_storage(root: str | Path) -> Storage:
    """Open the storage at a local path or a URL that pyarrow knows (s3://, gs://, abfs://, hdfs://, file://).

    S3 reads the usual AWS variables; AWS_ENDPOINT_URL points it at another server.

    Raises:
        ConfigError: the root is empty, or not a URL that pyarrow knows.
    """
    if not str(root):
        raise ConfigError("registry: it is empty; give a folder or a URL, or leave it out")
    if isinstance(root, Path) or "://" not in root:
        return LocalStorage(Path(root).expanduser().absolute())
    try:
        filesystem, path = fs.FileSystem.from_uri(root)
    except pa.ArrowInvalid as error:
        raise ConfigError(
            f"registry {root!r}: {error}; allowed are a folder and URLs such as s3://bucket/registry"
        ) from None
    if isinstance(filesystem, fs.LocalFileSystem):
        return LocalStorage(Path(path))
    if not path:
        raise ConfigError(f"registry {root!r}: the bucket is missing; give for example s3://bucket/registry")
    return ObjectStorage(filesystem, path)


class LocalStorage:
    """A folder on a file system with an atomic rename."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list_folders(self, path: str) -> list[str]:
        try:
            with os.scandir(self.root / path) as entries:
                return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []

    def list_files(self, path: str) -> list[str]:
        return [entry.name for entry in (self.root / path).iterdir() if not entry.name.startswith(_HIDDEN)]

    def exist(self, paths: list[str]) -> list[bool]:
        return [(self.root / path).is_file() for path in paths]

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def download(self, path: str, target: Path) -> None:
        shutil.copyfile(self.root / path, target, follow_symlinks=False)

    def write(self, path: str, data: bytes) -> None:
        target = self.root / path
        staged = target.with_name(f".writing-{uuid.uuid4().hex}")
        try:
            with staged.open("xb") as opened:
                opened.write(data)
                opened.flush()
                os.fsync(opened.fileno())
            staged.replace(target)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        _sync(target.parent)

    def delete(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        home = self.root / name
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / ".lock", timeout=LOCK_TIMEOUT_S):
            for leftover in [*home.glob(f"{_STAGED}*"), *home.glob(".writing-*")]:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        staged = self.root / name / f"{_STAGED}{uuid.uuid4().hex}"
        try:
            staged.mkdir()
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def commit(self, staged: Path, name: str, number: int) -> bool:
        for file in staged.iterdir():
            _sync(file)
        _sync(staged)
        target = self.root / name / str(number)
        try:
            staged.rename(target)  # fails if the target exists: a version's folder is never empty
        except OSError:
            if target.exists():  # made by a writer that ignores our lock, say on another machine
                return False
            raise
        _sync(target.parent)
        return True


class ObjectStorage:
    """A bucket, or part of one."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs = fs.SubTreeFileSystem(root, filesystem)
        self._whole, self._bucket = filesystem, root.split("/")[0]

    def list_folders(self, path: str) -> list[str]:
        names = [info.base_name for info in self._list(path) if info.type == fs.FileType.Directory]
        if not names and not path:
            self._check_bucket()
        return names

    def list_files(self, path: str) -> list[str]:
        names = [info.base_name for info in self._list(path) if info.type != fs.FileType.Directory]
        return [name for name in names if not name.startswith(_HIDDEN)]

    def exist(self, paths: list[str]) -> list[bool]:
        return [info.type == fs.FileType.File for info in self._fs.get_file_info(paths)]

    def read(self, path: str) -> bytes:
        with self._fs.open_input_stream(path) as opened:
            return bytes(opened.read())

    def download(self, path: str, target: Path) -> None:
        with self._fs.open_input_stream(path) as source, target.open("xb") as opened:
            shutil.copyfileobj(source, opened, 2**20)

    def write(self, path: str, data: bytes) -> None:
        with self._fs.open_output_stream(path) as opened:  # one put, when it closes
            opened.write(data)

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.delete_file(path)

    def lock(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()

    @contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        self._drop_abandoned(name)
        with tempfile.TemporaryDirectory(prefix="rankloom-") as folder:
            yield Path(folder)

    def commit(self, staged: Path, name: str, number: int) -> bool:
        folder = f"{name}/{number}"
        claim = f"{_CLAIM}{uuid.uuid4().hex}"
        written = [claim]
        try:
            self.write(f"{folder}/{claim}", b"")
            if {info.base_name for info in self._list(folder)} != {claim}:
                self.delete(f"{folder}/{claim}")
                time.sleep(random.uniform(0, 0.5))  # both writers may have yielded: break the tie
                return False
            names = sorted(file.name for file in staged.iterdir() if file.name != RECORD)
            for file in names:
                written.append(file)
                with (staged / file).open("rb") as source, self._fs.open_output_stream(f"{folder}/{file}") as target:
                    shutil.copyfileobj(source, target, 2**20)
            if {info.base_name for info in self._list(folder)} != {claim, *names}:
                raise RegistryError(f"{folder}: another process removed files while they were uploaded; publish again")
            written.append(RECORD)
            self.write(f"{folder}/{RECORD}", (staged / RECORD).read_bytes())
        except BaseException:
            for file in reversed(written):  # record.json first, the claim last
                with suppress(OSError):
                    self.delete(f"{folder}/{file}")
            raise
        with suppress(OSError):  # a leftover claim does no harm
            self.delete(f"{folder}/{claim}")
        return True

    def _check_bucket(self) -> None:
        """Raise FileNotFoundError if the bucket is missing; pyarrow lists a missing bucket as empty."""
        if self._whole.type_name not in ("s3", "gcs"):
            return  # their paths do not begin with a bucket
        if self._whole.get_file_info(self._bucket).type == fs.FileType.NotFound:
            raise FileNotFoundError(f"there is no bucket {self._bucket!r}")

    def _drop_abandoned(self, name: str) -> None:
        """Remove uploads of killed writers; their claims stay, so that their numbers are never reused."""
        folders: dict[str, dict[str, Any]] = {}
        for info in self._fs.get_file_info(fs.FileSelector(name, recursive=True, allow_not_found=True)):
            if info.type == fs.FileType.File:
                parent, _, file = info.path.rpartition("/")
                folders.setdefault(parent, {})[file] = info
        for parent, files in folders.items():
            claims = [info.mtime for file, info in files.items() if file.startswith(_CLAIM)]
            if claims and RECORD not in files and datetime.now(UTC) - max(claims) > ABANDONED_AFTER:
                for file in files:
                    if not file.startswith(_CLAIM):
                        self.delete(f"{parent}/{file}")

    def _list(self, path: str) -> list[Any]:
        return list(self._fs.get_file_info(fs.FileSelector(path, allow_not_found=True)))


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a power cut can't leave a visible version without its bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
