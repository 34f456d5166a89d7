"""Board: what is known of a study's trials, from its journal; pure.

The journal (`journal.jsonl` in the study's folder) is what the driver writes: a line when a trial starts, one for
each report, one when it ends. It is read back when a study goes on, so a report may come twice; the later one counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rankloom.config import StudyConfig, TrialConfig, dump
from rankloom.config.space import Point
from rankloom.config.study import COSTS, AshaConfig, is_fusable

Status = Literal["running", "done", "stopped", "failed"]
CURVE = ("step", "percent", "loss", "accuracy", "train_loss", "tokens", "train_s")
Line = dict[str, Any]
NUM_SHOWN = 8
"""Trials that a display lists."""


@dataclass
class TrialState:
    """One trial of the study."""

    id: str
    number: int
    point: Point
    config: TrialConfig
    status: Status = "running"
    """done: ran to its end; stopped: by the scheduler; failed: with `error`."""
    error: str | None = None
    curve: dict[int, Line] = field(default_factory=dict)
    """Number of the report -> its values."""
    costs: dict[str, float] = field(default_factory=dict)
    """Those of `search.objectives` that were measured."""

    @property
    def method(self) -> str:
        """lora, qlora, dora, ...: the method with its base's quantisation."""
        kind, quantization = self.config.method.type, self.config.quantization.type
        return {"none": kind, "nf4": f"q{kind}"}.get(quantization, f"{kind}-{quantization}")

    @property
    def reports(self) -> list[Line]:
        return [self.curve[n] for n in sorted(self.curve)]

    @property
    def last(self) -> Line | None:
        return self.curve[max(self.curve)] if self.curve else None

    def best(self, metric: str) -> Line | None:
        """Its best report; of equal ones the one of lower loss, then the earlier."""
        return min(self.reports, key=lambda line: (*rank(line, metric), line["step"]), default=None)


def rank(line: Line, metric: str) -> tuple[float, float]:
    """Sorts reports, the best first."""
    return (-line["accuracy"] if metric == "accuracy" else line["loss"], line["loss"])


class Leaderboard:
    """The study's trials."""

    def __init__(self, study: StudyConfig) -> None:
        self.study = study
        self.trials: dict[str, TrialState] = {}
        self.num_refused = 0
        """Points that the searcher proposed and no trial can have."""

    @classmethod
    def read(cls, study: StudyConfig, journal: Path) -> Leaderboard:
        """From a journal; a half line, which a killed driver leaves, is nothing."""
        board = cls(study)
        for text in journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            board.add(line)
        return board

    def add(self, line: Line) -> None:
        """Take a line of the journal in."""
        trial_id = line["trial"]
        if line["event"] == "trial":
            point = dict(line["point"])
            number = int(point.pop("number"))
            self.num_refused = max(self.num_refused, int(point.pop("refused")))
            known = self.trials.get(trial_id)
            # an exploit changes the point of a trial that keeps its number
            number = known.number if known else number
            config = self.study.resolve(point, number)
            curve, costs = (known.curve, known.costs) if known else ({}, {})
            self.trials[trial_id] = TrialState(trial_id, number, point, config, curve=curve, costs=costs)
        elif line["event"] == "report":
            self.trials[trial_id].curve[line["n"]] = {name: line[name] for name in CURVE}
            self.trials[trial_id].costs |= {name: line[name] for name in COSTS if line.get(name) is not None}
        elif line["event"] == "end":
            self.trials[trial_id].status, self.trials[trial_id].error = line["status"], line["error"]

    def ranking(self) -> list[TrialState]:
        """The trials with a report, the best by validation first; a failed one's best report counts as any other."""
        metric = self.study.search.metric
        scored = [(trial, best) for trial in self.trials.values() if (best := trial.best(metric)) is not None]
        return [trial for trial, best in sorted(scored, key=lambda pair: (*rank(pair[1], metric), pair[0].number))]

    def candidates(self) -> list[TrialState]:
        """Those of the ranking that have an adapter, or can be given one: no dedicated run that failed."""
        return [trial for trial in self.ranking() if is_fusable(trial.config) or trial.status in ("done", "stopped")]

    @property
    def baseline(self) -> TrialState | None:
        return next((trial for trial in self.trials.values() if trial.point.get("warm_start") == 0), None)

    def front(self) -> list[TrialState]:
        """The Pareto front, best by the metric first; empty where the study has no `search.objectives`.

        Of the candidates whose costs are known, those than which no other is as good in all and better in something.
        """
        search = self.study.search
        if not search.objectives:
            return []
        measured = [trial for trial in self.candidates() if trial.costs.keys() >= set(search.objectives)]
        values = [
            (
                rank(trial.best(search.metric) or {}, search.metric)[0],
                *(trial.costs[name] for name in search.objectives),
            )
            for trial in measured
        ]

        def beaten(mine: tuple[float, ...]) -> bool:
            return any(
                other != mine and all(theirs <= own for theirs, own in zip(other, mine, strict=True))
                for other in values
            )

        return [trial for trial, mine in zip(measured, values, strict=True) if not beaten(mine)]

    def finalists(self) -> list[TrialState]:
        """The top k, each method's best, the front and the baseline: what is scored on the test rows."""
        ranking, found = self.candidates(), {}
        for trial in [*ranking[: self.study.final.top_k], *self.front()]:
            found[trial.id] = trial
        methods: set[str] = set()
        for trial in ranking:
            if trial.method not in methods:
                methods.add(trial.method)
                found[trial.id] = trial
        if self.baseline is not None and self.baseline in ranking:
            found[self.baseline.id] = self.baseline
        return [trial for trial in ranking if trial.id in found]

    def counts(self) -> dict[str, int]:
        """Status -> trials."""
        counts = dict.fromkeys(("running", "done", "stopped", "failed"), 0)
        for trial in self.trials.values():
            counts[trial.status] += 1
        return counts

    def rungs(self) -> list[tuple[float, int]]:
        """For successive halving: each rung, in percent of a trial's budget, and how many trials came to it."""
        scheduler, found = self.study.scheduler, []
        if isinstance(scheduler, AshaConfig):
            rung = max(1.0, round(100 * scheduler.grace))
            while rung < 100:
                reached = sum(
                    trial.last is not None and trial.last["percent"] >= rung for trial in self.trials.values()
                )
                found.append((rung, reached))
                rung *= scheduler.reduction_factor
        return found

    def summary(self) -> dict[str, Any]:
        """What a display shows, as plain data."""
        metric = self.study.search.metric
        top = [
            {
                "name": trial.config.name,
                "method": trial.method,
                "settings": settings(trial),
                "status": trial.status,
                "value": (trial.best(metric) or {})[metric],
                "percent": (trial.last or {})["percent"],
            }
            for trial in self.ranking()[:NUM_SHOWN]
        ]
        return {
            "metric": metric,
            "total": self.study.num_trials,
            "counts": self.counts(),
            "refused": self.num_refused,
            "rungs": self.rungs(),
            "best": top,
            "tokens": self.tokens,
            "share": self.share_done,
        }

    @property
    def tokens(self) -> int:
        """Tokens that the trials were trained on."""
        return sum(trial.last["tokens"] for trial in self.trials.values() if trial.last)

    @property
    def share_done(self) -> float:
        """About how much of the study is behind us, 0 to 1: a trial that was stopped is as done as one that ended."""
        done = sum(
            1.0 if trial.status != "running" else trial.last["percent"] / 100 if trial.last else 0.0
            for trial in self.trials.values()
        )
        return min(1.0, done / self.study.num_trials)


def settings(trial: TrialState) -> str:
    """What a trial was given by the space, short: `rank 8, learning_rate 0.0012`."""
    if "warm_start" in trial.point:
        return "baseline" if trial.point["warm_start"] == 0 else "warm start"
    knobs = {name.rpartition(".")[2]: value for name, value in trial.point.items() if name != "branch"}
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in knobs.items()
    )


def rows(board: Leaderboard) -> list[dict[str, Any]]:
    """One row a trial, for results.parquet."""
    found, metric, front = [], board.study.search.metric, {trial.id for trial in board.front()}
    for trial in sorted(board.trials.values(), key=lambda t: t.number):
        best, last = trial.best(metric), trial.last or {}
        found.append(
            {
                "number": trial.number,
                "trial": trial.id,
                "name": trial.config.name,
                "method": trial.method,
                "status": trial.status,
                "error": trial.error,
                "best_loss": best and best["loss"],
                "best_accuracy": best and best["accuracy"],
                "best_step": best and best["step"],
                "steps": last.get("step", 0),
                "tokens": last.get("tokens", 0),
                "train_s": last.get("train_s", 0.0),
                **{name: trial.costs.get(name) for name in COSTS},
                "on_front": trial.id in front,
                "point": json.dumps(trial.point),
                "config": json.dumps(dump(trial.config)),
                "curve": trial.reports,
            }
        )
    return found


def write_results(board: Leaderboard, path: Path) -> None:
    """results.parquet: every trial's config and learning curve."""
    import pyarrow as pa
    from pyarrow import parquet

    number = {"step": pa.int64(), "tokens": pa.int64()}
    curve = pa.list_(pa.struct([(name, number.get(name, pa.float64())) for name in CURVE]))
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    schema = pa.schema(
        [
            ("number", whole), ("trial", text), ("name", text), ("method", text), ("status", text), ("error", text),
            ("best_loss", real), ("best_accuracy", real), ("best_step", whole), ("steps", whole), ("tokens", whole),
            ("train_s", real), *((name, real) for name in COSTS), ("on_front", pa.bool_()), ("point", text),
            ("config", text), ("curve", curve),
        ]
    )  # fmt: skip
    table = pa.Table.from_pylist(rows(board), schema=schema)
    staged = path.with_suffix(".staged")
    parquet.write_table(table, staged)
    staged.replace(path)
