"""Finds and reads rows: of the built-in set, of the hub, or of files on any fsspec filesystem.

`locate` finds a source; `Located.key` identifies its contents without parsing a row, `Located.read` reads it through
the `datasets` builders, `Located.try_read_head` reads only its first rows; `pick_columns` determines the format and
renames. Rendering begins in render.py.
"""

from __future__ import annotations

import difflib
import errno
import glob
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Literal

import datasets
import fsspec
from datasets.table import InMemoryTable
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileSystem

from rankloom.config.data import ALIASES, COLUMNS, OPTIONAL, DataConfig, Source
from rankloom.data.files import BUILDERS, explain_not_utf8, read_files, read_head
from rankloom.errors import ConfigError, DataError

Role = Literal["train", "validation", "test", "retention"]

FIELDS: dict[Role, str] = {
    "train": "data.train",
    "validation": "data.validation",
    "test": "data.test",
    "retention": "eval.retention",
}
DEFAULT_SPLITS: dict[Role, str] = {"train": "train", "validation": "validation", "test": "test", "retention": "test"}
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?")
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors that mean: the source is fine, but its copy can't be written."""
READ_BYTES = 50_000_000
"""Data up to this size is read completely before a run, which takes seconds."""
CHANGE_MARKS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created", "updated")
"""Names that filesystems use for a mark that changes with a file's contents."""


@dataclass(frozen=True)
class Located:
    """A source that exists, with the functions that read it."""

    field: str
    """The setting that names it."""
    path: str
    make_key: Callable[[], str]
    read: Callable[[Path], datasets.Dataset]
    """Reads the rows; writes temporary files to the given folder, which must outlive the data set."""
    read_head: Callable[[int], datasets.Dataset]
    size: int | None = None
    """Bytes of its files; None: unknown, or on the hub."""

    @cached_property
    def key(self) -> str:
        """A hash that changes with the contents, computed by reading the files; DataError if they can't be read."""
        return self.make_key()

    def try_read_head(self, num_rows: int) -> datasets.Dataset | None:
        """Read the first rows, and little more of the source; None if that can't be done, though `read` may succeed.

        Raises:
            DataError: as in `read`.
        """
        try:
            return self.read_head(num_rows)
        except DataError as error:
            raise DataError(f"{self.field}: {error}") from None
        except Exception:  # each filesystem and reader raises its own kinds; some can't read a part
            return None


def locate(source: Source, role: Role) -> Located:
    """Find a source, without a request to the hub.

    Raises:
        ConfigError: the source's keys contradict each other.
        DataError: there is no such file.
    """
    field = FIELDS[role]
    if source.path.startswith("builtin:"):
        return _locate_builtin(source, role)
    if _is_file(source.path):
        for name in ("split", "subset", "revision"):
            if value := getattr(source, name):
                raise ConfigError(f"{field}.{name}: {value!r} does not apply to the file {source.path!r}; remove it")
        return _locate_files(source.path, field)
    return _locate_hub(source, role)


def check_sources(config: DataConfig, retention: Source | None) -> int | None:
    """Find all sources, without reading them.

    Returns:
        Bytes of all files; None if a size is unknown, or a source is on the hub.

    Raises:
        ConfigError, DataError: as in `locate`.
    """
    sizes = [locate(source, role).size for role, source in resolve_sources(config, retention).items()]
    return None if None in sizes else sum(size or 0 for size in sizes)


def resolve_sources(config: DataConfig, retention: Source | None) -> dict[Role, Source]:
    """Return the given sources; a built-in data set whose train split is trained on adds its own test rows."""
    test = config.test
    if test is None and config.train.path.startswith("builtin:") and config.train.split in (None, "train"):
        test = Source(path=config.train.path, split="test")
    given: dict[Role, Source | None] = {
        "train": config.train, "validation": config.validation, "test": test, "retention": retention
    }  # fmt: skip
    return {role: source for role, source in given.items() if source is not None}


def pick_columns(
    dataset: datasets.Dataset, located: Located, format: str, columns: Mapping[str, str]
) -> tuple[datasets.Dataset, str]:
    """Select the columns that the format reads and give them the format's names.

    float32 numbers keep the digits that they are written with: 0.1, not 0.10000000149011612.

    Args:
        format: a key of `COLUMNS`, or auto.
        columns: the format's name of a column -> its name in the source.

    Returns:
        The columns, and the format, which is never auto.

    Raises:
        DataError: a column is missing, or there is no row.
        ConfigError: `columns` renames a column that the format does not read.
    """
    if not len(dataset):
        raise DataError(f"{located.field}: {located.path} has no rows")
    names = dataset.column_names
    there = f"{located.path} has {', '.join(map(repr, names)) or 'none'}"
    for role, name in columns.items():
        if name not in names:
            raise DataError(f"data.columns: {role}: no column {name!r}{_make_hint(name, names)}; {there}")

    def find_column(role: str) -> str:
        others = (name for name in ALIASES.get(role, ()) if name in names and role not in names)
        return columns.get(role) or next(others, role)

    if format == "auto":
        if located.field != FIELDS["retention"]:
            _check_spelling(names, columns, find_column, located.field)
        fitting = [
            f
            for f, roles in COLUMNS.items()
            if set(columns) <= {*roles, *OPTIONAL[f]} and all(find_column(role) in names for role in roles)
        ]
        if not fitting:
            needs = "; ".join(f"{f}: {', '.join(roles)}" for f, roles in COLUMNS.items())
            how = "" if located.field == FIELDS["retention"] else "; rename with data.columns, e.g. {label: category}"
            raise DataError(f"{located.field}: no format fits the columns; {there}; formats need {needs}{how}")
        format = fitting[0]
    roles, optional = COLUMNS[format], OPTIONAL[format]
    if unused := sorted(set(columns) - {*roles, *optional}):
        raise ConfigError(
            f"data.columns: {unused[0]!r} is not read by the format {format}, which reads "
            f"{', '.join([*roles, *optional])}; remove it"
        )
    roles = (*roles, *(role for role in optional if find_column(role) in names))
    wanted = {find_column(role): role for role in roles}
    if missing := [name for name in wanted if name not in names]:
        near = _make_hint(missing[0], names)
        spare = next((name for name in names if name not in wanted), None)
        how = f"; rename with data.columns, e.g. {{{wanted[missing[0]]}: {spare}}}" if spare else ""
        raise DataError(f"{located.field}: the format {format} needs the column {missing[0]!r}{near}; {there}{how}")
    if len(wanted) < len(roles):
        raise ConfigError(f"data.columns: {', '.join(roles)} need a column each, given {dict(columns)}")
    kept = dataset.select_columns(list(wanted))
    for name, feature in kept.features.items():
        if feature == datasets.Value("float32"):
            kept = kept.cast_column(name, datasets.Value("string")).cast_column(name, datasets.Value("float64"))
    return kept.rename_columns({name: role for name, role in wanted.items() if name != role}), format


def _check_spelling(
    names: list[str], columns: Mapping[str, str], find_column: Callable[[str], str], field: str
) -> None:
    """Raise DataError if names differ only in capitals or spaces from those that a format would read."""
    roles = {role: role for table in (COLUMNS, OPTIONAL) for each in table.values() for role in each}
    roles |= {alias: role for role, aliases in ALIASES.items() for alias in aliases}
    nearly = {role: name for name in names if (role := roles.get(name.strip().lower())) and name != find_column(role)}
    for format, required in COLUMNS.items():
        read = (*required, *OPTIONAL[format])
        if not set(columns) <= set(read) or not all(find_column(r) in names or r in nearly for r in required):
            continue
        if unlike := [f"{r}: {nearly[r]!r}" for r in read if r in nearly and find_column(r) not in names]:
            raise DataError(
                f"{field}: the format {format} would read these columns without the capitals or spaces in their names; "
                f"rename with data.columns={{{', '.join(unlike)}}}, or set data.format"
            )
        return


def find_unread_columns(dataset: datasets.Dataset, picked: datasets.Dataset, columns: Mapping[str, str]) -> list[str]:
    """Return the columns of a source that `pick_columns` left out."""
    read = {columns.get(role, role) for role in picked.column_names}
    read |= {
        alias for role in picked.column_names if role not in dataset.column_names for alias in ALIASES.get(role, ())
    }
    return [name for name in dataset.column_names if name not in read]


def _locate_builtin(source: Source, role: Role) -> Located:
    field, name = FIELDS[role], source.path.removeprefix("builtin:")
    root = resources.files("rankloom.data") / "builtin"
    known = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    if name not in known:
        allowed = ", ".join(f"builtin:{n}" for n in known)
        raise ConfigError(f"{field}: unknown {source.path!r}{_make_hint(name, known)}; allowed: {allowed}")
    for key in ("subset", "revision"):
        if value := getattr(source, key):
            raise ConfigError(f"{field}.{key}: {value!r} does not apply to {source.path!r}; remove it")
    split = source.split or DEFAULT_SPLITS[role]
    splits = sorted(f.name.removesuffix(".csv") for f in (root / name).iterdir() if f.name.endswith(".csv"))
    if split not in splits:
        raise ConfigError(f"{field}: {source.path} has no split {split!r}; it has {', '.join(splits)}")
    located = _locate_files(str(root / name / f"{split}.csv"), field)
    return replace(located, path=f"{source.path} ({split})")


def _locate_hub(source: Source, role: Role) -> Located:
    field, split = FIELDS[role], source.split or DEFAULT_SPLITS[role]
    if not HUB_ID.fullmatch(source.path):
        raise ConfigError(
            f"{field}: {source.path!r} is neither a built-in set, a hub id such as 'org/name', nor a file ending in "
            f"{', '.join(BUILDERS)} (.gz may follow)"
        )
    load = partial(datasets.load_dataset, source.path, name=source.subset, split=split, revision=source.revision)

    @cache
    def load_whole() -> datasets.Dataset:
        try:
            return load()
        except Exception as error:  # the hub client and the builders raise a dozen unrelated kinds
            raise DataError(
                f"{field}: {source.path!r} (split {split!r}) is not a file here, and the hub does not give it: "
                f"{explain(error)}; check the spelling, split, subset and revision, the network, and HF_TOKEN if gated"
            ) from None

    def read_first(num_rows: int) -> datasets.Dataset:
        stream = load(streaming=True)
        table = next(stream.with_format("arrow").iter(num_rows))
        return datasets.Dataset(InMemoryTable(table), datasets.DatasetInfo(features=stream.features))

    def make_key() -> str:
        return f"hub:{load_whole()._fingerprint}"  # follows the commit, configuration and split

    return Located(field, source.path, make_key, lambda _: load_whole(), read_first)


def _is_file(path: str) -> bool:
    local = Path(path).expanduser()
    return (
        "://" in path
        or path.startswith((".", "/", "~"))
        or glob.has_magic(path)
        or _read_extension(path) in BUILDERS
        or local.exists()
    )


def _locate_files(path: str, field: str) -> Located:
    filesystem, pattern = _open_filesystem(path, field)
    try:
        paths = _find_matching(filesystem, pattern)
        if not paths:
            raise DataError(f"{field}: {_explain_not_found(filesystem, path, pattern)}")
        kinds = {_read_extension(p) for p in paths}
        if unknown := sorted(kinds - set(BUILDERS)):
            raise ConfigError(
                f"{field}: {path!r}: {unknown[0] or 'a file without an extension'} is not read; allowed: "
                f"{', '.join(BUILDERS)} (.gz may follow)"
            )
        if len({BUILDERS[kind] for kind in kinds}) > 1:
            raise DataError(f"{field}: {path!r} matches files of several kinds: {', '.join(sorted(kinds))}; narrow it")
        sizes = [filesystem.size(p) for p in paths]
        if isinstance(filesystem, LocalFileSystem):
            for each in paths:
                Path(each).open("rb").close()  # fail now if it may not be read
    except (DataError, ConfigError):
        raise
    except Exception as error:  # each filesystem raises its client's own kinds
        raise DataError(f"{field}: {path!r} can't be read: {explain(error)}") from None
    builder = BUILDERS[kinds.pop()]

    def make_key() -> str:
        try:
            marks = [_make_content_key(filesystem, p) for p in paths]
        except Exception as error:  # as above
            raise DataError(f"{field}: {path!r} can't be read: {explain(error)}") from None
        return hashlib.sha256("\n".join([builder, *marks]).encode()).hexdigest()

    def read_first(num_rows: int) -> datasets.Dataset:
        if 0 in sizes:
            raise DataError(f"{paths[sizes.index(0)]} is empty")
        return read_head([OpenFile(filesystem, p) for p in paths], builder, num_rows)

    def read(scratch: Path) -> datasets.Dataset:
        return _read(filesystem, paths, builder, scratch, field)

    return Located(field, path, make_key, read, read_first, None if None in sizes else sum(sizes))


def _open_filesystem(path: str, field: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if "://" not in path:
        return LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        filesystem: tuple[fsspec.AbstractFileSystem, str] = fsspec.core.url_to_fs(path)
        return filesystem
    except ImportError as error:
        missing = error
    except ValueError as error:
        raise ConfigError(f"{field}: {path!r}: {explain(error)}") from None
    # s3 and gs need no extra package: pyarrow, which the registry uses too, reads both
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import FileSystem

    try:
        arrow, inner = FileSystem.from_uri(path)
    except Exception:  # not one of pyarrow's filesystems
        raise DataError(f"{field}: {path!r} needs a package: {explain(missing)}") from None
    return ArrowFSWrapper(arrow), inner


def _find_matching(filesystem: fsspec.AbstractFileSystem, pattern: str) -> list[str]:
    if filesystem.isfile(pattern):
        return [pattern]
    if not glob.has_magic(pattern):
        return []
    if isinstance(filesystem, LocalFileSystem):  # existing folders are literal: their names are not patterns
        folder = next(each for each in Path(pattern).parents if each.is_dir())
        pattern = glob.escape(str(folder)) + pattern.removeprefix(str(folder))
    return sorted(p for p in filesystem.glob(pattern) if filesystem.isfile(p))


def _explain_not_found(filesystem: fsspec.AbstractFileSystem, path: str, pattern: str) -> str:
    if filesystem.isdir(pattern):
        return f"{path!r} is a folder; give a file, or a pattern such as {path.rstrip('/')}/*.jsonl"
    if glob.has_magic(pattern):
        return f"no file matches {path!r}"
    parent, name = pattern.rpartition("/")[::2]
    try:
        siblings = [PurePosixPath(p).name for p in filesystem.ls(parent, detail=False)]
    except OSError:
        return f"no file {path!r}, nor its folder"
    if name in siblings:
        return f"{path!r} is not a regular file, nor a link to one"
    return f"no file {path!r}{_make_hint(name, siblings)}"


def _make_content_key(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    """Return a local file's hash, or a remote file's version mark if its filesystem keeps one."""
    if not isinstance(filesystem, LocalFileSystem):
        info = filesystem.info(path)
        if marks := [f"{mark}={info[mark]}" for mark in CHANGE_MARKS if info.get(mark)]:
            return f"{type(filesystem).__name__}:{path}:{info['size']}:{marks}"
    with filesystem.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(
    filesystem: fsspec.AbstractFileSystem, paths: list[str], builder: str, scratch: Path, field: str
) -> datasets.Dataset:
    files = []
    for i, path in enumerate(paths):
        try:
            if filesystem.size(path) == 0:
                raise DataError(f"{field}: {path} is empty")
            if isinstance(filesystem, LocalFileSystem):
                files.append(path)
            else:
                copy = scratch / f"{i}-{PurePosixPath(path).name}"
                filesystem.get_file(path, str(copy))
                files.append(str(copy))
        except DataError:
            raise
        except Exception as error:  # as in _files
            raise DataError(f"{field}: {path} can't be fetched: {explain(error)}") from None
    try:
        return read_files(files, builder, scratch)
    except DataError as error:
        raise DataError(f"{field}: {error}") from None
    except Exception as error:  # pyarrow, pandas, gzip and the builder each raise their own kinds
        cause = _find_root_cause(error)
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            raise cause from None
        if "corresponds to no data" in str(cause):  # the message of `datasets` for a header without rows
            raise DataError(f"{field}: {', '.join(paths)} has no rows") from None
        reason = explain(error)
        if isinstance(cause, UnicodeDecodeError):
            reason = next(filter(None, map(explain_not_utf8, files)), reason)
        raise DataError(f"{field}: {', '.join(paths)} can't be read as {builder}: {reason}") from None


def _read_extension(path: str) -> str:
    return PurePosixPath(path.lower().removesuffix(".gz")).suffix


def _make_hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def explain(error: BaseException) -> str:
    """Return the kind and the first line of the root cause."""
    error = _find_root_cause(error)
    return f"{type(error).__name__}: {(str(error).strip() or 'no details').splitlines()[0]}"


def _find_root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
