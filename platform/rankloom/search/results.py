"""What a study leaves, for Python and for a notebook; `to_dict` is what `--json` prints and result.json holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rankloom.launch.results import Result, html_table, in_short
from rankloom.registry.scorecard import Scorecard

if TYPE_CHECKING:
    import pandas


class ValidationScore(Result):
    """A trial's best evaluation on the validation rows."""

    loss: float | None
    accuracy: float | None
    metric: float | None = None
    """Of `search.metric`, where it is a function of the user's own."""
    step: int | None


class ScoredTrial(Result):
    """One of a study's best trials, scored on the test rows."""

    trial: str
    """The trial's id in the study: its folder in `adapters/`, its row in results.parquet."""
    number: int
    """Its place in the order in which trials began."""
    name: str
    method: str
    point: dict[str, Any]
    """The branch and the value of each knob."""
    validation: ValidationScore
    """What it was chosen by."""
    costs: dict[str, float | None]
    """The study's objectives beside its metric, as far as they were measured."""
    on_front: bool
    """Whether no other trial is better in the metric and in every objective."""
    scorecard: Scorecard | None
    """What was measured on the test rows; None where `error` says why not."""
    published: tuple[str, ...]
    """The versions that it was published as, such as `tickets@1`."""
    error: str | None

    @property
    def adapter(self) -> str | None:
        """The first version that it was published as."""
        return self.published[0] if self.published else None

    def __repr__(self) -> str:
        measures = in_short(self.scorecard.result, self.scorecard.base) if self.scorecard else self.error
        return f"ScoredTrial({self.adapter or self.name} ({self.method}): {measures})"


class StudyResult(Result):
    """A study: its winner, its Pareto front, and every trial."""

    status: Literal["done", "interrupted"]
    """interrupted: it was stopped; tune again with `resume=True`."""
    name: str
    """The study's name."""
    folder: str = Field(alias="study")
    """The study's folder; in JSON it is called `study`."""
    results: str
    """The file with a row for each trial, results.parquet."""
    counts: dict[str, int]
    """Trials that are running, done, stopped early and failed."""
    num_refused: int
    """Points whose settings exclude each other, so that they made no trial."""
    priors: dict[str, Any]
    """Trials of earlier studies that the searcher knew."""
    tokens: int
    """Tokens that all trials trained on."""
    hosts: tuple[dict[str, Any], ...]
    """What each host did."""
    winner: ScoredTrial | None = None
    """The best trial on the validation rows."""
    front: tuple[ScoredTrial, ...] = ()
    """The scored trials on the Pareto front of the metric and the objectives."""
    baseline: ScoredTrial | None = None
    """What a user would have trained without a search."""
    finalists: tuple[ScoredTrial, ...] = ()
    """All scored trials, the best on the validation rows first."""
    registry: str | None = None
    """Where they were published."""
    beats_baseline: bool | None = None
    """Whether the winner is better than the baseline on the test rows; None where they are the same trial."""

    @property
    def adapter(self) -> str | None:
        """The winner's version in the registry, such as `tickets@1`."""
        return None if self.winner is None else self.winner.adapter

    @property
    def trials(self) -> pandas.DataFrame:
        """Every trial, one a row, read from results.parquet at each access."""
        import pandas

        return pandas.read_parquet(self.results)

    def __repr__(self) -> str:
        counted = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
        winner = f"; winner {self.winner!r}" if self.winner is not None else ""
        return f"StudyResult({self.name}: {self.status}, {counted}{winner})"

    def _repr_html_(self) -> str:
        rows = [
            (
                row.name + (" (baseline)" if self.baseline is not None and row.trial == self.baseline.trial else ""),
                row.method,
                in_short(row.scorecard.result, row.scorecard.base) if row.scorecard else row.error or "",
                "yes" if row.on_front else "",
                ", ".join(row.published),
            )
            for row in self.finalists
        ]
        return html_table(f"{self.name}, {self.status}", ("trial", "method", "test", "front", "published"), rows)
