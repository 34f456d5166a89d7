"""Leaderboard: the state of a study's trials, from its journal; pure.

The journal (`journal.jsonl` in the study's folder) is what the driver writes: a line when a trial starts, one for
each report, one when it ends. It is read when a study resumes, so a report may come twice; the later one counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from rankloom.config import StudyConfig, TrialConfig, dump
from rankloom.config.space import Point
from rankloom.config.study import COSTS, AshaConfig, SearchConfig, is_fusable
from rankloom.events import (
    CurvePoint,
    Event,
    LeaderboardRow,
    StudyStatus,
    TrialEnded,
    TrialEvaluated,
    TrialStarted,
    TrialStatus,
    read_events,
)
from rankloom.search.suggestion import Suggestion

CURVE = ("step", "percent", "loss", "accuracy", "metric", "train_loss", "tokens", "train_s")
NUM_SHOWN = 8
"""Trials that a display lists."""


@dataclass
class TrialState:
    """One trial of the study."""

    id: str
    number: int
    point: Point
    config: TrialConfig
    status: TrialStatus = "running"
    """done: it ran to its end; stopped: the scheduler ended it; failed: see `error`."""
    error: str | None = None
    curve: dict[int, CurvePoint] = field(default_factory=dict)
    """Number of the report -> the report."""
    costs: dict[str, float] = field(default_factory=dict)
    """The measured `search.objectives`, by name."""
    label: str | None = None
    """The name that its branch or warm start was given."""

    @property
    def method(self) -> str:
        """Its label, else lora, qlora, dora, ...: the method with its base's quantisation."""
        if self.label is not None:
            return self.label
        kind, quantization = self.config.method.type, self.config.quantization.type
        return {"none": kind, "nf4": f"q{kind}"}.get(quantization, f"{kind}-{quantization}")

    @property
    def reports(self) -> list[CurvePoint]:
        """Its reports in order; the later one where a resumed run reported its step again under the next number."""
        return list({self.curve[n].step: self.curve[n] for n in sorted(self.curve)}.values())

    @property
    def last(self) -> CurvePoint | None:
        return self.curve[max(self.curve)] if self.curve else None

    def find_best(self, search: SearchConfig) -> CurvePoint | None:
        """Return its best report; of equal ones the one with the lower loss, then the earlier."""
        return min(self.reports, key=lambda point: (*rank(point, search), point.step), default=None)


def rank(point: CurvePoint, search: SearchConfig) -> tuple[float, float]:
    """Return a sort key that puts the best report first."""
    return (-search.sign * point.get_value(search.key), point.loss)


class Leaderboard:
    """The study's trials and their ranking, kept up to date by `add`."""

    def __init__(self, study: StudyConfig) -> None:
        self.study = study
        self.trials: dict[str, TrialState] = {}
        self.num_refused = 0
        """Points of the searcher that no valid trial can have."""

    @classmethod
    def read(cls, study: StudyConfig, journal: Path) -> Leaderboard:
        """Read a journal; skip a half line that a killed driver left."""
        leaderboard = cls(study)
        for event in read_events(journal) if journal.is_file() else ():
            leaderboard.add(event)
        return leaderboard

    def add(self, event: Event) -> None:
        """Add an event of the journal."""
        match event:
            case TrialStarted():
                self._start(event)
            case TrialEvaluated():
                trial = self.trials[event.trial]
                trial.curve[event.n] = event
                trial.costs |= {name: cost for name in COSTS if (cost := getattr(event, name)) is not None}
            case TrialEnded():
                self.trials[event.trial].status, self.trials[event.trial].error = event.status, event.error

    def _start(self, event: TrialStarted) -> None:
        suggestion, known = Suggestion.read(event.point), self.trials.get(event.trial)
        self.num_refused = max(self.num_refused, suggestion.refused)
        if known:  # an exploit changes the point of a trial that keeps its number
            suggestion = replace(suggestion, number=known.number)
        curve, costs = (known.curve, known.costs) if known else ({}, {})
        self.trials[event.trial] = TrialState(
            event.trial, suggestion.number, suggestion.point, suggestion.resolve(self.study), curve=curve, costs=costs,
            label=self.study.get_label(suggestion.point),
        )  # fmt: skip

    def rank_trials(self) -> list[TrialState]:
        """Return the trials with a report, the best by validation first; a failed trial's best report counts too."""
        search = self.study.search
        scored = [(trial, best) for trial in self.trials.values() if (best := trial.find_best(search)) is not None]
        return [trial for trial, best in sorted(scored, key=lambda pair: (*rank(pair[1], search), pair[0].number))]

    def list_candidates(self) -> list[TrialState]:
        """Return the ranking without failed dedicated runs: trials that have an adapter or can get one."""
        return [
            trial for trial in self.rank_trials() if is_fusable(trial.config) or trial.status in ("done", "stopped")
        ]

    @property
    def baseline(self) -> TrialState | None:
        return next((trial for trial in self.trials.values() if trial.point.get("warm_start") == 0), None)

    def find_front(self) -> list[TrialState]:
        """Return the Pareto front, best by the metric first; empty where the study has no `search.objectives`.

        It holds each candidate with known costs that no other candidate matches in all values and beats in one.
        """
        search = self.study.search
        if not search.objectives:
            return []
        measured, values = [], []
        for trial in self.list_candidates():
            best = trial.find_best(search)
            if best is not None and trial.costs.keys() >= set(search.objectives):
                measured.append(trial)
                values.append((rank(best, search)[0], *(trial.costs[name] for name in search.objectives)))

        def is_beaten(mine: tuple[float, ...]) -> bool:
            return any(
                other != mine and all(theirs <= own for theirs, own in zip(other, mine, strict=True))
                for other in values
            )

        return [trial for trial, mine in zip(measured, values, strict=True) if not is_beaten(mine)]

    def choose_finalists(self) -> list[TrialState]:
        """Return the trials to score on the test rows: the top k, each method's best, the front and the baseline."""
        ranking, found = self.list_candidates(), {}
        for trial in [*ranking[: self.study.final.top_k], *self.find_front()]:
            found[trial.id] = trial
        methods: set[str] = set()
        for trial in ranking:
            if trial.method not in methods:
                methods.add(trial.method)
                found[trial.id] = trial
        if self.baseline is not None and self.baseline in ranking:
            found[self.baseline.id] = self.baseline
        return [trial for trial in ranking if trial.id in found]

    def count_by_status(self) -> dict[TrialStatus, int]:
        """Return the number of trials of each status."""
        counts: dict[TrialStatus, int] = dict.fromkeys(get_args(TrialStatus), 0)
        for trial in self.trials.values():
            counts[trial.status] += 1
        return counts

    def count_at_rungs(self) -> list[tuple[float, int]]:
        """Return each rung of successive halving in percent of a trial's budget, and how many trials reached it."""
        scheduler, found = self.study.scheduler, []
        if isinstance(scheduler, AshaConfig):
            rung = max(1.0, round(100 * scheduler.grace))
            while rung < 100:
                reached = sum(trial.last is not None and trial.last.percent >= rung for trial in self.trials.values())
                found.append((rung, reached))
                rung *= scheduler.reduction_factor
        return found

    def build_status(self) -> StudyStatus:
        """Return the study's status, without the hosts and the time."""
        search = self.study.search
        top = [
            LeaderboardRow(
                name=trial.config.name,
                method=trial.method,
                settings=format_settings(trial),
                status=trial.status,
                value=best.get_value(search.key),
                percent=last.percent,
            )
            for trial in self.rank_trials()[:NUM_SHOWN]
            if (best := trial.find_best(search)) and (last := trial.last)
        ]
        return StudyStatus(
            metric=search.metric,
            total=self.study.num_trials,
            counts=self.count_by_status(),
            refused=self.num_refused,
            rungs=self.count_at_rungs(),
            best=top,
            tokens=self.tokens,
            share=self.share_done,
        )

    @property
    def tokens(self) -> int:
        """Tokens that the trials were trained on."""
        return sum(trial.last.tokens for trial in self.trials.values() if trial.last)

    @property
    def share_done(self) -> float:
        """Estimated share of the study that is done, 0 to 1; a stopped trial counts as done."""
        done = sum(
            1.0 if trial.status != "running" else trial.last.percent / 100 if trial.last else 0.0
            for trial in self.trials.values()
        )
        return min(1.0, done / self.study.num_trials)


def format_settings(trial: TrialState) -> str:
    """Return a trial's values of the knobs as short text: `rank 8, learning_rate 0.0012`."""
    if "warm_start" in trial.point and trial.label is not None:
        return f"learning_rate {trial.config.optim.learning_rate:.3g}, seed {trial.config.seed}"
    if "warm_start" in trial.point:
        return "baseline" if trial.point["warm_start"] == 0 else "warm start"
    knobs = {name.rpartition(".")[2]: value for name, value in trial.point.items() if name != "branch"}
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in knobs.items()
    )


def build_rows(leaderboard: Leaderboard) -> list[dict[str, Any]]:
    """Return one row per trial, for results.parquet."""
    found, front = [], {trial.id for trial in leaderboard.find_front()}
    for trial in sorted(leaderboard.trials.values(), key=lambda t: t.number):
        best, last = trial.find_best(leaderboard.study.search), trial.last
        found.append(
            {
                "number": trial.number,
                "trial": trial.id,
                "name": trial.config.name,
                "method": trial.method,
                "status": trial.status,
                "error": trial.error,
                "best_loss": best and best.loss,
                "best_accuracy": best and best.accuracy,
                "best_metric": best and best.metric,
                "best_step": best and best.step,
                "steps": last.step if last else 0,
                "tokens": last.tokens if last else 0,
                "train_s": last.train_s if last else 0.0,
                **{name: trial.costs.get(name) for name in COSTS},
                "on_front": trial.id in front,
                "point": json.dumps(trial.point),
                "config": json.dumps(dump(trial.config)),
                "curve": [{name: getattr(point, name) for name in CURVE} for point in trial.reports],
            }
        )
    return found


def write_results(leaderboard: Leaderboard, path: Path) -> None:
    """Write results.parquet: every trial's config and learning curve."""
    import pyarrow as pa
    from pyarrow import parquet

    number = {"step": pa.int64(), "tokens": pa.int64()}
    curve = pa.list_(pa.struct([(name, number.get(name, pa.float64())) for name in CURVE]))
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    schema = pa.schema(
        [
            ("number", whole), ("trial", text), ("name", text), ("method", text), ("status", text), ("error", text),
            ("best_loss", real), ("best_accuracy", real), ("best_metric", real), ("best_step", whole), ("steps", whole),
            ("tokens", whole), ("train_s", real), *((name, real) for name in COSTS), ("on_front", pa.bool_()),
            ("point", text), ("config", text), ("curve", curve),
        ]
    )  # fmt: skip
    table = pa.Table.from_pylist(build_rows(leaderboard), schema=schema)
    staged = path.with_suffix(".staged")
    parquet.write_table(table, staged)
    staged.replace(path)
