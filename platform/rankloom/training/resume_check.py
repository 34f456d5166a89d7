"""Origin: what trained weights come from beside their trial's settings: rows, a base's weights, libraries.

It lies in every checkpoint, and in a study's folder for each base and data, so that `--resume` continues with nothing
else.
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
"""Keys of a config.json that say nothing of what the model computes here."""
ORIGINS = "origins"
"""In a study's folder, a folder for each base and data."""


class Origin(BaseModel):
    """One of them."""

    model_config = ConfigDict(frozen=True)

    data: str
    """Of the tokens, their weights and the labels that are trained on and validated with."""
    base: str
    """The base's fingerprint."""
    config: str | None = None
    """Of the base's config.json, which says how its weights are used; None: from a rankloom that did not keep it."""
    versions: Versions

    @classmethod
    def of(cls, data: TaskData, base: Base) -> Origin:
        rows = json.dumps([data.train.digest(), data.validation.digest(), data.labels], sort_keys=True)
        digest = hashlib.sha256(rows.encode()).hexdigest()
        config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
        config = json.dumps(
            {key: value for key, value in config.items() if key not in NOT_OF_THE_MODEL}, sort_keys=True
        )
        return cls(
            data=f"sha256:{digest}",
            base=base.fingerprint,
            config=f"sha256:{hashlib.sha256(config.encode()).hexdigest()}",
            versions=Versions.here(),
        )

    def write(self, folder: Path) -> None:
        """Raises RankloomError where the folder can't be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staged = folder / f".{ORIGIN}.{uuid.uuid4().hex}"  # hosts of a study may write the same at once
            staged.write_text(self.model_dump_json())
            staged.replace(folder / ORIGIN)
        except OSError as error:
            raise RankloomError(f"could not write {folder / ORIGIN}: {error}") from None

    def check(self, folder: Path, trial: TrialConfig) -> str | None:
        """Compare with what was written there, if anything was.

        Returns:
            What to tell of libraries that are others now.

        Raises:
            DataError, ModelError: the data or the base is not the same.
        """
        try:
            then = Origin.model_validate_json((folder / ORIGIN).read_bytes())
        except FileNotFoundError:  # of a rankloom that wrote none
            return None
        except (OSError, ValidationError) as error:
            raise RankloomError(
                f"{folder / ORIGIN} is damaged: {str(error).splitlines()[0]}; start anew, name=..."
            ) from None
        changed = ", ".join(self.versions.changes(then.versions))
        for kind, what, before, now in (
            (
                DataError,
                f"the rows of data.train={trial.data.train.path} and its validation (as tokens, of the model's "
                f"tokenizer and template)",
                then.data,
                self.data,
            ),
            (ModelError, f"the weights of model.id={trial.model.id}", then.base, self.base),
            (ModelError, f"the settings in config.json of model.id={trial.model.id}", then.config, self.config),
        ):
            if before is not None and now is not None and before != now:
                libraries = f", with {changed}" if changed else ""
                raise kind(
                    f"--resume: {what} are not those that this began with ({before[:19]}... then, {now[:19]}... "
                    f"now{libraries}); restore them, or start anew with name=..."
                )
        return _warning(changed)


def hold_study_to(study: Path, trial: TrialConfig, origin: Origin) -> None:
    """Keep where a study's trials with this base and data come from, or compare it with what was kept.

    Args:
        study: the study's folder.

    Raises:
        DataError, ModelError: as `Origin.check`. RankloomError: the folder can't be written.
    """
    key = json.dumps([trial.model.model_dump(), trial.data.model_dump()], sort_keys=True)
    place = study / ORIGINS / hashlib.sha256(key.encode()).hexdigest()[:16]
    if (place / ORIGIN).is_file():
        origin.check(place, trial)
    else:
        origin.write(place)


def study_warning(study: Path) -> str | None:
    """What to tell of libraries that are not what they were when the study began."""
    for file in (study / ORIGINS).glob(f"*/{ORIGIN}"):
        then = Origin.model_validate_json(file.read_bytes()).versions
        return _warning(", ".join(Versions.here().changes(then)))
    return None


def _warning(changed: str) -> str | None:
    return f"it began with other versions, and may go on otherwise: {changed}" if changed else None
