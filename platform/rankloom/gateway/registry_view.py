"""RegistryView: the adapters that a registry has for one base, kept up to date."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from rankloom.errors import AdapterNotFoundError, RegistryError
from rankloom.gateway.policy import AdapterVersions
from rankloom.registry import Record, Registry

logger = logging.getLogger(__name__)


class RegistryView:
    """Reads a registry repeatedly. A version never changes, so its record is read once.

    What can't be read stays as it was: a short outage of an object store removes no adapter.
    """

    def __init__(self, registry: Registry, fits: Callable[[Record], bool]) -> None:
        """
        Args:
            fits: whether an adapter was tuned on the base that is served.
        """
        self.registry = registry
        self._fits = fits
        self._records: dict[str, Record | None] = {}
        self._adapters: dict[str, AdapterVersions] = {}

    def read(self, names: Iterable[str] | None = None) -> Mapping[str, AdapterVersions]:
        """Read the versions of these adapters, or of all. Blocks meanwhile."""
        found: dict[str, AdapterVersions] = {}
        try:
            wanted = list(self.registry.names()) if names is None else list(dict.fromkeys(names))
        except RegistryError as error:
            logger.warning("the adapters stay as they were: %s", error)
            return self._adapters
        for name in wanted:
            try:
                versions = self._read_versions(name)
            except RegistryError as error:
                logger.warning("%s stays as it was: %s", name, error)
                versions = self._adapters.get(name)
            if versions:
                found[name] = versions
        self._adapters = found
        return found

    def record(self, ref: str) -> Record | None:
        """Return the record of an exact version that was read."""
        return self._records.get(ref)

    def _read_versions(self, name: str) -> AdapterVersions | None:
        versions = [number for number in self.registry.versions(name) if self._reads_fitting(f"{name}@{number}")]
        if not versions:
            return None
        return AdapterVersions(
            tuple(versions), {alias: to for alias, to in self.registry.aliases(name).items() if to in versions}
        )

    def _reads_fitting(self, ref: str) -> bool:
        if ref not in self._records:
            try:
                record = self.registry.get(ref)
            except AdapterNotFoundError:
                return False  # removed since it was listed
            except RegistryError as error:  # a record that can't be read; its neighbours can
                logger.warning("%s", error)
                return False
            self._records[ref] = record if self._fits(record) else None
        return self._records[ref] is not None
