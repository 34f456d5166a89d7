"""Suggestion: what the searcher gives Ray Tune for a trial, as Tune and the journal carry it: one flat dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankloom.config import StudyConfig, TrialConfig
from rankloom.config.space import Point


@dataclass(frozen=True)
class Suggestion:
    """A point of the space for trial `number`; the trial is resolved wherever it is needed."""

    number: int
    refused: int
    """Points that the searcher has refused so far, since no trial can have them."""
    point: Point

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Suggestion:
        point = {name: value for name, value in config.items() if name not in ("number", "refused")}
        return cls(int(config["number"]), int(config["refused"]), point)

    def to_config(self) -> dict[str, Any]:
        return {"number": self.number, "refused": self.refused, **self.point}

    def resolve(self, study: StudyConfig) -> TrialConfig:
        """Return the trial. Raises as `StudyConfig.resolve` does."""
        return study.resolve(self.point, self.number)
