"""Registry: publish, find and promote versions of adapters, on a disk or an object store.

    <root>/<name>/<version>/    an adapter as PEFT reads it, with record.json and README.md; it never changes
    <root>/<name>/aliases.json  every move of every alias; the last move decides where an alias points
    <root>/<name>/suites.json   each version's scores on suites, which come after its publication
    <root>/.secret              random bytes, if an endpoint has sticky routes

A ref is `name`, `name@3`, `name@latest` or `name@alias`; `name` alone means `name@champion` if that alias is set,
else the latest version. `checks.py` defines what may be published, `storage.py` how it becomes visible atomically.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import secrets
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar

import filelock
import pyarrow
from pydantic import AwareDatetime, BaseModel, ConfigDict, TypeAdapter, ValidationError

from rankloom.config.trial import BASE, NAME_PATTERN
from rankloom.errors import AdapterNotFoundError, ConfigError, RankloomError, RegistryError
from rankloom.registry.card import render_model_card
from rankloom.registry.checks import CARD, RECORD, WEIGHTS, check_contents, check_files, describe, read_folder
from rankloom.registry.record import Draft, Record
from rankloom.registry.scorecard import SuiteResult
from rankloom.registry.storage import LOCK_TIMEOUT_S, LocalStorage, open_storage

CHAMPION = "champion"
LATEST = "latest"
_ALIASES = "aliases.json"
_SUITES = "suites.json"
_REMOVED = "removed.json"
_SECRET = ".secret"  # no adapter can have this name
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_ALLOWED = "1 to 128 lower-case letters, digits, '.', '_' or '-', beginning with a letter or digit"

logger = logging.getLogger(__name__)


class AliasMove(BaseModel):
    """One change of an alias."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Literal["promote", "rollback"]
    version: int
    """Version that the alias points to from then on."""
    at: AwareDatetime


History = dict[str, list[AliasMove]]
"""Alias -> its moves, oldest first."""
T = TypeVar("T")
_History = TypeAdapter(History)
_Suites = TypeAdapter(dict[int, tuple[SuiteResult, ...]])


class Registry:
    """Versions of adapters under one root; safe for several processes (see `storage.py` for the guarantees).

    Every method raises RegistryError with the system's reason if the storage fails, and AdapterNotFoundError if a ref
    does not exist.
    """

    def __init__(self, root: str | Path) -> None:
        """Open the registry at `root`: a local folder, or a URL that pyarrow knows, such as s3://bucket/folder."""
        self.root = str(root)
        with self._translate_errors("open it"):
            self._storage = open_storage(root)

    def publish(self, name: str, folder: Path, draft: Draft) -> Record:
        """Copy an adapter's folder as the next version of `name`, with its record and a model card.

        An older record.json or README.md in the folder is not copied.
        """
        check_name(name)
        with self._translate_errors(f"publish {name}; nothing was published"):
            sources = {file: path for file, path in read_folder(folder).items() if file not in (RECORD, CARD)}
            with self._storage.lock(name), self._storage.stage(name) as staged:
                for file, path in sources.items():
                    shutil.copyfile(path, staged / file, follow_symlinks=False)
                check_contents(staged, sources)  # check the copy, which no other process changes
                files = {file: describe(staged / file) for file in sources}
                while True:
                    number = max(self._list_numbers(name), default=0) + 1
                    record = Record(**dict(draft), name=name, version=number, created=datetime.now(UTC), files=files)
                    (staged / CARD).write_text(render_model_card(record), encoding="utf-8")
                    record = record.model_copy(update={"files": files | {CARD: describe(staged / CARD)}})
                    (staged / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
                    if self._storage.commit(staged, name, number):
                        return record

    def publish_once(self, name: str, folder: Path, draft: Draft) -> Record:
        """Publish like `publish`, unless the run has published this already and died before it recorded that.

        A version counts as published if it has these weights and this draft, scorecard aside.
        """
        compared = [field for field in Draft.model_fields if field != "scorecard"]
        weights = describe(read_folder(folder)[WEIGHTS])
        for record in self.list(name) if self.versions(name) else ():
            same = all(getattr(record, field) == getattr(draft, field) for field in compared)
            if same and record.files[WEIGHTS] == weights:
                return record
        return self.publish(name, folder, draft)

    def secret(self) -> bytes:
        """Return 32 random bytes, made on first use and equal for every reader of this registry."""
        with self._translate_errors("read its secret"):
            if not self._storage.exist([_SECRET])[0]:
                with self._storage.lock(""):
                    if not self._storage.exist([_SECRET])[0]:
                        self._storage.write(_SECRET, secrets.token_bytes(32))
            return self._storage.read(_SECRET)

    def names(self) -> Sequence[str]:
        """Return every folder that may hold an adapter, without looking inside; fast enough for shell completion."""
        with self._translate_errors("list it"):
            return sorted(name for name in self._storage.list_folders("") if re.fullmatch(NAME_PATTERN, name))

    def list(self, name: str | None = None) -> Sequence[Record]:
        """Return all versions (of one adapter), by name and number. Unreadable ones are logged and left out."""
        records = []
        for each in self.names() if name is None else [_check_name(name)]:
            for version in self.versions(each):
                try:
                    records.append(self._record(each, version))
                except AdapterNotFoundError:
                    continue  # removed after the listing
                except RegistryError as error:
                    logger.warning("%s", error)
        if name is not None and not records:
            self._list_existing_versions(name)
        return records

    def versions(self, name: str) -> Sequence[int]:
        """Return the numbers of `name`'s versions, ascending; empty if there is no such adapter."""
        _check_name(name)
        with self._translate_errors(f"list {name}"):
            numbers = sorted(self._list_numbers(name))
            present = self._storage.exist([f"{name}/{number}/{RECORD}" for number in numbers])
            return [number for number, exists in zip(numbers, present, strict=True) if exists]

    def get(self, ref: str) -> Record:
        """Return the record of `ref`."""
        return self._record(*self._resolve(ref))

    def aliases(self, name: str) -> dict[str, int]:
        """Return alias -> version."""
        return {alias: moves[-1].version for alias, moves in self.history(name).items() if moves}

    def history(self, name: str) -> History:
        """Return the moves of every alias."""
        return self._read_beside(f"{_check_name(name)}/{_ALIASES}", _History)

    def promote(self, ref: str, alias: str = CHAMPION) -> Record:
        """Point `alias` to `ref`; here a bare name means its latest version. Promoting twice changes nothing."""
        _check_alias(alias)
        name, selector = parse_ref(ref)
        with self._translate_errors(f"promote {ref}; no alias was moved"):
            self._list_existing_versions(name)  # before the lock makes a folder
            with self._storage.lock(name):
                name, version = self._resolve(f"{name}@{selector or LATEST}")
                record, history = self._record(name, version), self.history(name)
                moves = history.get(alias, [])
                if not moves or moves[-1].version != version:
                    self._write_move(name, history, alias, "promote", version)
        return record

    def rollback(self, name: str, alias: str = CHAMPION) -> Record:
        """Point `alias` to its version before the last promotion; each further call undoes one more promotion.

        Removed versions are skipped.
        """
        _check_alias(alias)
        with self._translate_errors(f"roll {name} back; no alias was moved"):
            self._list_existing_versions(_check_name(name))
            with self._storage.lock(name):
                history, versions = self.history(name), self.versions(name)
                if alias not in history:
                    raise AdapterNotFoundError(f"{name} has no alias {alias!r}; it has {_join(history)}")
                earlier = [version for version in _list_promotions_in_force(history[alias])[:-1] if version in versions]
                if not earlier:
                    raise RegistryError(
                        f"{name}@{alias} has nothing to roll back to; promote a version: {_join(versions)}"
                    )
                record = self._record(name, earlier[-1])
                self._write_move(name, history, alias, "rollback", earlier[-1])
        return record

    def suites(self, ref: str) -> Sequence[SuiteResult]:
        """Return a version's latest scores on each suite."""
        name, version = self._resolve(ref)
        return self._read_suites(name).get(version, ())

    def record_suite(self, ref: str, result: SuiteResult) -> None:
        """Store a version's scores on a suite, in place of earlier ones."""
        name, version = self._resolve(ref)
        with self._translate_errors(f"store the scores of {ref}"), self._storage.lock(name):
            stored = self._read_suites(name)
            others = [each for each in stored.get(version, ()) if each.suite != result.suite]
            written = _Suites.dump_json(stored | {version: (*others, result)}, indent=2)
            self._storage.write(f"{name}/{_SUITES}", written + b"\n")

    def verify(self, ref: str) -> Record:
        """Check that a version has exactly the files of its record, unchanged and readable.

        Raises:
            RegistryError: lists every difference.
        """
        name, version = self._resolve(ref)
        record = self._record(name, version)
        with self._translate_errors(f"verify {record.ref}"):
            if isinstance(self._storage, LocalStorage):
                check_files(self._storage.root / name / str(version), record)
                return record
            with TemporaryDirectory(prefix="rankloom-") as folder:
                self._download(record, Path(folder))
                check_files(Path(folder), record)
        return record

    def fetch(self, ref: str, destination: Path) -> Path:
        """Copy a version to a local folder that is absent or empty, verify it, and return the folder.

        The folder appears complete or not at all.
        """
        name, version = self._resolve(ref)
        record = self._record(name, version)
        with self._translate_errors(f"fetch {record.ref} to {destination}"):
            if (
                destination.is_symlink()
                or destination.is_file()
                or (destination.is_dir() and any(destination.iterdir()))
            ):
                raise RegistryError(f"{destination}: exists and is not an empty folder; give another")
            destination.parent.mkdir(parents=True, exist_ok=True)
            staged = destination.absolute().with_name(f".fetching-{uuid.uuid4().hex}")
            try:
                staged.mkdir()
                self._download(record, staged)
                check_files(staged, record)
                os.rename(staged, destination)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        return destination

    def rm(self, ref: str, *, force: bool = False) -> Record:
        """Remove a version; its number is never reused.

        Args:
            force: remove it even if an alias points to it; the alias is broken until it is moved.

        Raises:
            RegistryError: an alias points to it, and `force` is off.
        """
        name, selector = parse_ref(ref)
        if selector is None:
            raise RegistryError(f"rm {ref!r}: name the version to remove, for example {name}@1")
        with self._translate_errors(f"remove {ref}"):
            self._list_existing_versions(name)
            with self._storage.lock(name):
                _, version = self._resolve(ref)
                record = self._record(name, version)
                pointing = [alias for alias, target in self.aliases(name).items() if target == version]
                if pointing and not force:
                    raise RegistryError(
                        f"{record.ref} is {_join(pointing)}; promote another version or roll back first, or force it"
                    )
                folder = f"{name}/{version}"
                self._storage.write(f"{folder}/{_REMOVED}", f'{{"at": "{datetime.now(UTC).isoformat()}"}}\n'.encode())
                self._storage.delete(f"{folder}/{RECORD}")  # from now on the version does not exist
                for file in self._storage.list_files(folder):
                    if file != _REMOVED:
                        self._storage.delete(f"{folder}/{file}")
        return record

    def _list_numbers(self, name: str) -> Sequence[int]:
        """Return every number ever given, also those of removed versions and of unfinished uploads."""
        return [int(number) for number in self._storage.list_folders(name) if _NUMBER.fullmatch(number)]

    def _list_existing_versions(self, name: str) -> Sequence[int]:
        versions = self.versions(name)
        if not versions:
            known = [each for each in self.names() if self.versions(each)]
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {_join(near, ' or ')}?" if near else f"it holds {_join(known[:10])}"
            raise AdapterNotFoundError(f"no adapter {name!r} in {self.root}; {hint}")
        return versions

    def _resolve(self, ref: str) -> tuple[str, int]:
        name, selector = parse_ref(ref)
        versions = self._list_existing_versions(name)
        alias = selector or CHAMPION
        if alias.isdigit():
            version, subject = int(alias), f"{name} has no version {alias}"
        elif alias == LATEST:
            return name, versions[-1]
        elif alias in (aliases := self.aliases(name)):
            version = aliases[alias]
            subject = f"{name}@{alias} points to version {version}, which was removed; promote another"
        elif selector is None:
            return name, versions[-1]
        else:
            near = difflib.get_close_matches(alias, aliases, n=1, cutoff=0.5)
            hint = f"did you mean {name}@{near[0]}?" if near else f"it has {_join([*aliases, LATEST])}"
            raise AdapterNotFoundError(f"{name} has no alias {selector!r}; {hint}")
        if version not in versions:
            raise AdapterNotFoundError(f"{subject}; it has {_join(versions[-20:])}")
        return name, version

    def _record(self, name: str, version: int) -> Record:
        path = f"{name}/{version}/{RECORD}"
        with self._translate_errors(f"read {path}"):
            try:
                record = Record.model_validate_json(self._storage.read(path))
            except FileNotFoundError:
                raise AdapterNotFoundError(f"{name}@{version} was removed from {self.root}") from None
            except ValidationError as error:
                raise RegistryError(
                    f"{self.root}/{path} is not a record of this rankloom: {_format_detail(error)}"
                ) from None
        if (record.name, record.version) != (name, version):
            raise RegistryError(f"{self.root}/{path} is the record of {record.ref}; a version can't be moved by hand")
        return record

    def _read_suites(self, name: str) -> dict[int, tuple[SuiteResult, ...]]:
        return self._read_beside(f"{name}/{_SUITES}", _Suites)

    def _read_beside(self, path: str, kind: TypeAdapter[T]) -> T:
        """Return what a file beside the versions holds; nothing where it is not there."""
        with self._translate_errors(f"read {path}"):
            if not self._storage.exist([path])[0]:
                return kind.validate_python({})
            try:
                return kind.validate_json(self._storage.read(path))
            except ValidationError as error:
                raise RegistryError(
                    f"{self.root}/{path} is damaged: {_format_detail(error)}; restore or delete it"
                ) from None

    def _download(self, record: Record, folder: Path) -> None:
        stored = f"{record.name}/{record.version}"
        names = {*self._storage.list_files(stored), *self._storage.list_folders(stored)}
        if unexpected := sorted(names - {*record.files, RECORD}):
            raise RegistryError(f"{record.ref} is broken: not in the record: {_join(unexpected)}")
        for file in sorted(names):
            self._storage.download(f"{stored}/{file}", folder / file)

    def _write_move(
        self, name: str, history: History, alias: str, action: Literal["promote", "rollback"], version: int
    ) -> None:
        move = AliasMove(action=action, version=version, at=datetime.now(UTC))
        moved = history | {alias: [*history.get(alias, []), move]}
        self._storage.write(f"{name}/{_ALIASES}", _History.dump_json(moved, indent=2) + b"\n")

    @contextmanager
    def _translate_errors(self, what: str) -> Iterator[None]:
        """Turn the storage's errors into RegistryError with the system's reason."""
        action, _, outcome = what.partition("; ")
        ending = f"; {outcome}" if outcome else ""
        try:
            yield
        except RankloomError:
            raise
        except filelock.Timeout:
            raise RegistryError(
                f"registry {self.root}: can't {action}: another process has held its lock for "
                f"{LOCK_TIMEOUT_S:.0f} s{ending}"
            ) from None
        except (OSError, pyarrow.ArrowException) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            file = f" ({error.filename})" if getattr(error, "filename", None) else ""
            raise RegistryError(f"registry {self.root}: can't {action}: {reason}{file}{ending}") from error


def parse_ref(ref: str) -> tuple[str, str | None]:
    """Split `name@selector`; the selector is a number, an alias, or None.

    Raises:
        ConfigError: the name or the selector is malformed.
    """
    name, at, selector = ref.partition("@")
    _check_name(name)
    if not at:
        return name, None
    if not (_NUMBER.fullmatch(selector) or (re.fullmatch(NAME_PATTERN, selector) and not selector.isdigit())):
        raise ConfigError(f"ref {_quote(ref)}: after the @ comes a version (1, 2, ...) or an alias: {_ALLOWED}")
    return name, selector


def check_name(name: str) -> None:
    """Raise ConfigError if nothing can be published under this name."""
    if _check_name(name) == BASE:
        raise ConfigError(f"adapter name {name!r}: it means the base without an adapter; choose another")


def _check_name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(f"adapter name {_quote(name)}: allowed are {_ALLOWED}")
    return name


def _check_alias(alias: str) -> None:
    if not re.fullmatch(NAME_PATTERN, alias) or alias.isdigit() or alias == LATEST:
        raise ConfigError(
            f"alias {_quote(alias)}: allowed are {_ALLOWED}, but not a number, and not {LATEST!r}, which is built in"
        )


def _list_promotions_in_force(moves: list[AliasMove]) -> list[int]:
    """Return the versions that a rollback can reach: promotions in force, the current one last."""
    stack: list[int] = []
    for move in moves:
        if move.action == "promote":
            stack.append(move.version)
        else:
            while len(stack) > 1 and stack[-1] != move.version:
                stack.pop()
    return stack


def _quote(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _join(items: Iterable[object], separator: str = ", ") -> str:
    return separator.join(map(str, items)) or "none"


def _format_detail(error: ValidationError) -> str:
    detail = error.errors()[0]
    return f"{'.'.join(map(str, detail['loc'])) or 'the file'}: {detail['msg']}"
