"""Origin: the rows, the base's weights and the libraries that trained weights come from, beside the trial's settings.

Every checkpoint has one, and a study's folder has one for each base and data, so that `--resume` refuses to continue
with other rows or another base.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from rankloom.config.trial import TrialConfig
from rankloom.errors import DataError, ModelError, RankloomError
from rankloom.registry import Versions

if TYPE_CHECKING:  # a study's driver has no torch
    from rankloom.data import TaskData
    from rankloom.models import Base

ORIGIN = "origin.json"
NOT_OF_THE_MODEL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Keys of a config.json that do not change what the model computes here."""
ORIGINS = "origins"
"""Subfolder of a study's folder, with a folder for each base and data."""


class Origin(BaseModel):
    """The data, base and libraries of a training."""

    model_config = ConfigDict(frozen=True)

    data: str
    """Digest of the training and validation rows (tokens and loss weights) and of the labels."""
    base: str
    """The base's fingerprint."""
    config: str | None = None
    """Digest of the base's config.json, which defines how its weights are used; None: an older rankloom wrote none."""
    versions: Versions
    """The libraries' versions."""

    @classmethod
    def collect(cls, data: TaskData, base: Base) -> Origin:
        """Collect the origin of a training on `data` and `base`, with the installed libraries."""
        config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
        config = json.dumps(
            {key: value for key, value in config.items() if key not in NOT_OF_THE_MODEL}, sort_keys=True
        )
        return cls(
            data=digest_data(data),
            base=base.fingerprint,
            config=f"sha256:{hashlib.sha256(config.encode()).hexdigest()}",
            versions=Versions.from_installed(),
        )

    def write(self, folder: Path) -> None:
        """Write origin.json into a folder, which is created where it is missing.

        Raises:
            RankloomError: the folder can't be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staged = folder / f".{ORIGIN}.{uuid.uuid4().hex}"  # a study's hosts may write it concurrently
            staged.write_text(self.model_dump_json())
            staged.replace(folder / ORIGIN)
        except OSError as error:
            raise RankloomError(f"could not write {folder / ORIGIN}: {error}") from None

    def check(self, folder: Path, trial: TrialConfig) -> str | None:
        """Compare with the folder's origin.json, where it has one.

        Returns:
            A warning for the user where libraries have changed, else None.

        Raises:
            DataError, ModelError: the data or the base has changed. RankloomError: the file is damaged.
        """
        try:
            then = Origin.model_validate_json((folder / ORIGIN).read_bytes())
        except FileNotFoundError:  # an older rankloom wrote none
            return None
        except (OSError, ValidationError) as error:
            raise RankloomError(
                f"{folder / ORIGIN} is damaged: {str(error).splitlines()[0]}; start again with name=..."
            ) from None
        changed = ", ".join(self.versions.list_changes(then.versions))
        for kind, what, before, now in (
            (
                DataError,
                f"the rows of data.train={trial.data.train.path} and its validation (as tokens, rendered by the "
                f"model's tokenizer and template)",
                then.data,
                self.data,
            ),
            (ModelError, f"the weights of model.id={trial.model.id}", then.base, self.base),
            (ModelError, f"the settings in config.json of model.id={trial.model.id}", then.config, self.config),
        ):
            if before is not None and now is not None and before != now:
                libraries = f", with {changed}" if changed else ""
                raise kind(
                    f"--resume: {what} have changed since the start ({before[:19]}... then, {now[:19]}... "
                    f"now{libraries}); restore them, or start again with name=..."
                )
        return _make_warning(changed)


def digest_data(data: TaskData) -> str:
    """Return the hash of the rows that training reads: their tokens and loss weights, and the labels."""
    rows = json.dumps([data.train.digest(), data.validation.digest(), data.labels], sort_keys=True)
    return f"sha256:{hashlib.sha256(rows.encode()).hexdigest()}"


def hold_study_to(study: Path, trial: TrialConfig, origin: Origin) -> None:
    """Write a study's origin for the trial's base and data, or compare `origin` with the one that is there.

    Args:
        study: the study's folder.

    Raises:
        DataError, ModelError: the data or the base has changed. RankloomError: the folder can't be written.
    """
    key = json.dumps([trial.model.model_dump(), trial.data.model_dump()], sort_keys=True)
    place = study / ORIGINS / hashlib.sha256(key.encode()).hexdigest()[:16]
    if (place / ORIGIN).is_file():
        origin.check(place, trial)
    else:
        origin.write(place)


def find_study_warning(study: Path) -> str | None:
    """Return a warning for the user where libraries have changed since the study began, else None."""
    for file in (study / ORIGINS).glob(f"*/{ORIGIN}"):
        then = Origin.model_validate_json(file.read_bytes()).versions
        return _make_warning(", ".join(Versions.from_installed().list_changes(then)))
    return None


def _make_warning(changed: str) -> str | None:
    return f"libraries have changed since the start, and so may the results: {changed}" if changed else None
