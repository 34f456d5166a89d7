"""Results of a study, for Python and notebooks; `--json` prints `to_dict`, and result.json holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rankloom.events import FinalistScored, StudyFinished
from rankloom.hosts.host_loop import HostReport
from rankloom.launch.results import Result, render_html_table, summarize
from rankloom.registry.scorecard import Scorecard
from rankloom.search.priors import PriorCounts

if TYPE_CHECKING:
    import pandas


class ValidationScore(Result):
    """A trial's best evaluation on the validation rows."""

    loss: float | None
    accuracy: float | None
    metric: float | None = None
    """Value of `search.metric`, where that is the user's own function."""
    step: int | None


class ScoredTrial(Result):
    """One of a study's best trials, scored on the test rows."""

    trial: str
    """The trial's id in the study: its folder in `adapters/`, its row in results.parquet."""
    number: int
    """Its place in the order of the trials' starts."""
    name: str
    method: str
    point: dict[str, Any]
    """The branch and the value of each knob."""
    validation: ValidationScore
    """The measures that it was chosen by."""
    costs: dict[str, float | None]
    """The study's measured objectives beside its metric."""
    on_front: bool
    """Whether it is on the Pareto front of the metric and the objectives."""
    scorecard: Scorecard | None
    """The measures on the test rows; None where `error` gives the reason."""
    published: tuple[str, ...]
    """The versions that it was published as, such as `tickets@1`."""
    error: str | None

    @property
    def adapter(self) -> str | None:
        """The first of its published versions."""
        return self.published[0] if self.published else None

    def to_event(self) -> FinalistScored:
        return FinalistScored(
            trial=self.trial,
            name=self.name,
            method=self.method,
            step=self.validation.step,
            scorecard=None if self.scorecard is None else self.scorecard.model_dump(mode="json"),
            published=list(self.published),
            error=self.error,
        )

    def __repr__(self) -> str:
        measures = summarize(self.scorecard.result, self.scorecard.base) if self.scorecard else self.error
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
    """Points refused because their settings exclude each other."""
    priors: PriorCounts
    """The earlier trials that the searcher knew."""
    tokens: int
    """Tokens that all trials trained on."""
    hosts: tuple[HostReport, ...]
    """Each host's counters when the search ended."""
    winner: ScoredTrial | None = None
    """The best trial on the validation rows."""
    front: tuple[ScoredTrial, ...] = ()
    """The scored trials on the Pareto front of the metric and the objectives."""
    baseline: ScoredTrial | None = None
    """The trial without a search: the first warm start, or `trial` itself."""
    finalists: tuple[ScoredTrial, ...] = ()
    """All scored trials, the best on the validation rows first."""
    registry: str | None = None
    """The registry with the published adapters."""
    beats_baseline: bool | None = None
    """Whether the winner's value on the test rows is better than the baseline's, be it by chance; None where they are
    the same trial."""

    @property
    def adapter(self) -> str | None:
        """The winner's version in the registry, such as `tickets@1`."""
        return None if self.winner is None else self.winner.adapter

    @property
    def trials(self) -> pandas.DataFrame:
        """All trials, one per row, read from results.parquet at each access."""
        import pandas

        return pandas.read_parquet(self.results)

    def to_event(self) -> StudyFinished:
        """Return the event that reports this result."""
        return StudyFinished(
            name=self.name,
            study=self.folder,
            winner=None if self.winner is None else self.winner.to_event(),
            finalists=[trial.to_event() for trial in self.finalists],
            registry=self.registry,
            beats_baseline=self.beats_baseline,
        )

    def __repr__(self) -> str:
        counted = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
        winner = f"; winner {self.winner!r}" if self.winner is not None else ""
        return f"StudyResult({self.name}: {self.status}, {counted}{winner})"

    def _repr_html_(self) -> str:
        rows = [
            (
                row.name + (" (baseline)" if self.baseline is not None and row.trial == self.baseline.trial else ""),
                row.method,
                summarize(row.scorecard.result, row.scorecard.base) if row.scorecard else row.error or "",
                "yes" if row.on_front else "",
                ", ".join(row.published),
            )
            for row in self.finalists
        ]
        return render_html_table(f"{self.name}, {self.status}", ("trial", "method", "test", "front", "published"), rows)
