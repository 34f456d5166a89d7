"""A run's folder, `<output.root>/runs/<name>`, and whether a run may start, may resume or is finished.

It holds trial.yaml (the resolved config), id, the checkpoints (the launcher's), events.jsonl and tensorboard/
(`tracking.py`), result.json once the run is done, and error.log after a crash. The process that runs
it holds a lock file beside it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

from rankloom.config import TrialConfig, dump, parse
from rankloom.errors import ConfigError, RankloomError, TrialError
from rankloom.launch.results import TrialResult
from rankloom.registry.storage import open_storage

TRIAL, RESULT, ID, ERROR = "trial.yaml", "result.json", "id", "error.log"
EVENTS, CURVES = "events.jsonl", "tensorboard"
RAYS = ".validate_storage_marker"
"""The file that Ray Train leaves in every run's folder."""
CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints without Ray; Ray Train's are `checkpoint-*` folders beside it."""

MAY_CHANGE = (
    "budget.", "compute.", "output.", "tracking.",
    "eval.every", "eval.patience", "eval.batch_size",
    "eval.max_test_rows", "eval.retention", "eval.base", "eval.latency",
)  # fmt: skip
"""Settings (by prefix) that `--resume` takes from the new config: the weights so far and the scores that
chose the best checkpoint do not depend on them."""

Decision = Literal["start", "resume", "finished"]


class RunFolder:
    """One run's folder, on a local disk or an object store."""

    def __init__(self, trial: TrialConfig) -> None:
        """`trial.output.root` is absolute or a URL (see `config.paths.resolve_paths`)."""
        self.parent = f"{trial.output.root.rstrip('/')}/runs"
        self.path = f"{self.parent}/{trial.name}"
        with self._translate_write_errors():
            self._storage = open_storage(self.path)

    @property
    def local(self) -> Path | None:
        """The folder on this machine's file systems; None on an object store."""
        return None if "://" in self.path else Path(self.path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from running it during the `with` block. An object store has no lock.

        Raises:
            ConfigError: another process runs it.
        """
        if self.local is None:
            yield
            return
        with lock_folder(self.local, "run"):
            yield

    def decide_run(self, trial: TrialConfig, *, resume: bool) -> Decision:
        """Return whether to start this trial here, to resume it, or that it is finished.

        Raises:
            ConfigError: the folder holds another run, or there is no run to resume.
        """
        saved = self._read_trial()
        if saved is None:
            if resume:
                raise ConfigError(f"--resume: no run {trial.name!r} at {self.path}; omit --resume to start it")
            if self._is_foreign():
                raise ConfigError(f"{self.path} exists and does not hold a rankloom run; choose another name")
            return "start"
        if not resume:
            raise ConfigError(
                f"run {trial.name!r} exists at {self.path}; --resume continues it, or choose another name (name=...)"
            )
        changed = find_changes(saved, dump(trial))
        if refused := [line for key, line in changed.items() if not key.startswith(MAY_CHANGE)]:
            raise ConfigError(
                f"--resume of {trial.name!r}: these settings differ from the run's (saved -> given): "
                f"{'; '.join(refused)}; restore them, or start another run with name=..."
            )
        if (saved["compute"]["num_workers"] == 0) != (trial.compute.num_workers == 0):
            raise ConfigError(
                f"--resume of {trial.name!r}: a run without Ray (compute.num_workers=0) and one under Ray keep their "
                f"checkpoints differently; it began with compute.num_workers={saved['compute']['num_workers']}"
            )
        longer = any(key.startswith("budget.") for key in changed)
        return "finished" if self._storage.exist([RESULT])[0] and not longer else "resume"

    def begin(self, trial: TrialConfig) -> None:
        """Write the trial and, the first time, the run's id; delete an earlier result.

        Raises:
            TrialError: the folder can't be written.
        """
        with self._translate_write_errors():
            if self.local:
                self.local.mkdir(parents=True, exist_ok=True)
            if not self._storage.exist([ID])[0]:
                self.write(ID, uuid.uuid4().hex)
            self._storage.delete(RESULT)  # it is of a smaller budget; with the larger one the run is not finished
            self.write(TRIAL, yaml.safe_dump(dump(trial), sort_keys=False))

    def abandon(self) -> None:
        """Clean up after an error: a run without a checkpoint leaves only the error's trace."""
        with self._translate_write_errors():
            folders = self._storage.list_folders("")
            if any(name.startswith("checkpoint-") for name in folders) or self._storage.list_folders(CHECKPOINTS):
                return
            curves = [f"{CURVES}/{name}" for name in self._storage.list_files(CURVES)] if CURVES in folders else []
            events = [name for name in self._storage.list_files("") if name.startswith(EVENTS)]
            for name in (*curves, *events, RAYS, ID, TRIAL):
                self._storage.delete(name)
            for place in (self.local / CURVES, self.local / CHECKPOINTS, self.local) if self.local else ():
                with suppress(OSError):  # not empty, or not there
                    place.rmdir()

    @property
    def id(self) -> str:
        """The run's unique id; a later run of the same name has another."""
        return self._storage.read(ID).decode()

    def read_result(self) -> TrialResult:
        """Return what `train` returned when the run was done."""
        try:
            result = TrialResult.model_validate_json(self._storage.read(RESULT))
        except ValueError:
            raise TrialError(
                f"{self.path}/{RESULT} is damaged; the adapter is in the registry (rankloom adapters list); "
                f"without this file --resume scores and publishes again"
            ) from None
        return result

    def write(self, name: str, text: str) -> str:
        """Write a small file atomically and return its full path."""
        with self._translate_write_errors():
            self._storage.write(name, text.encode())
        return f"{self.path}/{name}"

    @contextmanager
    def open_scratch(self) -> Iterator[Path]:
        """Yield a local folder for files that grow; for an object store they are copied to the run at the end."""
        if self.local:
            yield self.local
            return
        with TemporaryDirectory(prefix="rankloom-") as folder:
            try:
                yield Path(folder)
            finally:
                self._upload(Path(folder))

    def _upload(self, folder: Path) -> None:
        from pyarrow import fs

        target, path = fs.FileSystem.from_uri(self.path)
        with self._translate_write_errors():
            for file in (f for f in folder.rglob("*") if f.is_file()):
                # one file per session: a resumed run does not overwrite earlier files
                place = f"{path}/{file.relative_to(folder)}"
                if target.get_file_info(place).type != fs.FileType.NotFound:
                    place += f".{uuid.uuid4().hex[:8]}"
                fs.copy_files(str(file), place, source_filesystem=fs.LocalFileSystem(), destination_filesystem=target)

    def _is_foreign(self) -> bool:
        """Return whether the folder holds files, none of them rankloom's."""
        if self._storage.exist([ID])[0] or (self.local and not self.local.is_dir()):
            return False
        return bool(self._storage.list_folders("") or set(self._storage.list_files("")) - {ERROR})

    def _read_trial(self) -> dict[str, Any] | None:
        with self._translate_write_errors():
            if not self._storage.exist([TRIAL])[0]:
                return None
            try:
                return dump(parse(TrialConfig, yaml.safe_load(self._storage.read(TRIAL)), TRIAL))
            except (yaml.YAMLError, UnicodeDecodeError, ConfigError) as error:
                raise TrialError(
                    f"{self.path}/{TRIAL}, the run's config, is damaged or from another version of rankloom: "
                    f"{' '.join(str(error).split())}; restore it, or choose another name (name=...)"
                ) from None

    @contextmanager
    def _translate_write_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, RankloomError):
                raise
            raise TrialError(f"output.root: {self.path} can't be used: {error}") from None


@contextmanager
def lock_folder(folder: Path, what: str) -> Iterator[None]:
    """Lock a run's or a study's folder. The lock file is beside it; the lock ends with its process.

    Raises:
        ConfigError: another process holds it. TrialError: the folder can't be written.
    """
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"{what} {folder.name!r} at {folder} is running in another process; wait for it, or choose another name "
            f"(name=...)"
        ) from None
    except OSError as error:
        raise TrialError(f"output.root: {folder} can't be used: {error}") from None
    try:
        yield
    finally:
        lock.release()


def find_changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Return setting -> `setting: old -> new` for each setting that differs."""
    before, after = flatten(old), flatten(new)
    keys = [*before, *(key for key in after if key not in before)]
    return {
        key: f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)
    }


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
