"""Record: what the registry stores about one version of an adapter; plain frozen data, no torch.

The publisher gives a `Draft`; the registry adds the name, the number, the date and the checksums, and writes all of
it as `record.json` into the version's folder.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

import rankloom
from rankloom.config.trial import Name
from rankloom.registry.scorecard import Scorecard

FILE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"
"""Pattern of a file directly in the version's folder: no separator, not hidden."""

FileName = Annotated[str, StringConstraints(pattern=FILE_PATTERN)]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BaseModelRef(_Plain):
    """The frozen base that the adapter was tuned on."""

    id: str
    fingerprint: str
    """`sha256:<hex>` of the stored weights, as `rankloom.models.fingerprint` reads it."""
    quantization: Literal["none", "int8", "nf4"]


class Lineage(_Plain):
    """Origin of a version."""

    parent: str | None = None
    """Version (`name@3`) that this one continues or copies."""
    run: str | None = None
    study: str | None = None


class Versions(_Plain):
    """Versions of the libraries that made it."""

    rankloom: str
    torch: str
    transformers: str
    peft: str

    @classmethod
    def from_installed(cls) -> Versions:
        """Return the installed versions."""
        return cls(rankloom=rankloom.__version__, **{each: version(each) for each in ("torch", "transformers", "peft")})

    def list_changes(self, since: Versions) -> list[str]:
        """Return `torch 2.12 -> 2.13` for each library that differs from `since`."""
        then = since.model_dump()
        return [f"{name} {then[name]} -> {now}" for name, now in self.model_dump().items() if then[name] != now]


class StoredFile(_Plain):
    """Size and checksum of a file."""

    bytes: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Draft(_Plain):
    """A record before the registry gives it a number."""

    method: str
    """lora, dora, adalora, ..."""
    base: BaseModelRef
    servable: Literal["itself", "rank pattern", "extracted"]
    """How the method's result became a PEFT folder."""
    trial: dict[str, Any]
    """The resolved trial config; for an adapter that rankloom did not train, only name, model and quantization."""
    data_fingerprint: str | None
    """None for an adapter that rankloom did not train."""
    scorecard: Scorecard | None
    """None if nothing was measured."""
    lineage: Lineage = Lineage()
    versions: Versions


class Record(Draft):
    """One version of an adapter. It never changes."""

    name: Name
    version: Annotated[int, Field(ge=1)]
    """Counts from 1; a number is never reused, not even after `rm`."""
    created: AwareDatetime
    """Time of publication, in UTC."""
    files: dict[FileName, StoredFile]
    """Every file of the version except record.json itself."""

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    def draft(self) -> Draft:
        """Return the draft of a copy of this version; the copy's parent is this version."""
        fields = {name: getattr(self, name) for name in Draft.model_fields}
        return Draft(**fields | {"lineage": self.lineage.model_copy(update={"parent": self.ref})})
