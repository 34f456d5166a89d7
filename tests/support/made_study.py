"""A study's folder with made-up trials, written by the code that writes a real one's."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rankloom.config import StudyConfig, dump, parse
from rankloom.events import TrialEnded, TrialEvaluated, TrialStarted, to_dict
from rankloom.hosts.host_loop import HostReport, Seat
from rankloom.search.flat_space import sample
from rankloom.search.leaderboard import Leaderboard, write_results
from rankloom.search.optuna_storage import write_optuna
from rankloom.search.study_files import JOURNAL, OPTUNA, RESULT, RESULTS, STUDY
from scorecards import COSTS

BEGIN = 1.79e9
"""Seconds since 1970 at which the study begins."""
SPACE: list[dict[str, Any]] = [
    {
        "method": {"type": "lora", "rank": {"choice": [4, 8, 16]}, "dropout": {"uniform": [0.0, 0.2]}},
        "optim": {"learning_rate": {"loguniform": [1e-4, 1e-2]}},
    },
    {"method": {"type": "dora", "rank": {"choice": [8, 16]}}, "optim": {"learning_rate": {"loguniform": [1e-4, 1e-2]}}},
]


def measures(right: int, num_rows: int = 200, loss: float = 1.0) -> dict[str, Any]:
    """Measures of an accuracy of `right` in `num_rows`, with an interval of the usual width."""
    share = right / num_rows
    half = 1.96 * math.sqrt(max(share * (1 - share), 1e-6) / num_rows)
    accuracy = {"value": share, "low": max(0.0, share - half), "high": min(1.0, share + half)}
    return {"num_rows": num_rows, "loss": loss, "perplexity": math.exp(loss), "accuracy": accuracy, "macro_f1": share}


def make_study(
    folder: Path, *, num_trials: int = 12, winner_right: int = 150, done: bool = True, model: str = "none/none"
) -> StudyConfig:
    """Write a study whose loss depends on the learning rate alone.

    Args:
        winner_right: test rows of 200 that the winner has right; the baseline has 100, the base 20.
        done: whether it has a result.
        model: the base, whose tokenizer a report reads the rows with; by default there is none.
    """
    study = parse(
        StudyConfig,
        {
            "name": folder.name,
            "trial": {
                "model": {"id": model},
                "output": {"root": str(folder.parent.parent)},
                "budget": {"steps": 40},
                "eval": {"every": 4},
            },
            "space": SPACE,
            "search": {"num_trials": num_trials, "objectives": ["memory_bytes", "latency_ms"]},
            "hosts": {"num_slots": 4},
        },
    )
    folder.mkdir(parents=True)
    (folder / STUDY).write_text(yaml.safe_dump(dump(study), sort_keys=False))
    _write_journal(study, folder, done)
    leaderboard = Leaderboard.read(study, folder / JOURNAL)
    write_results(leaderboard, folder / RESULTS)
    write_optuna(leaderboard, folder / JOURNAL, folder / OPTUNA)
    if done:
        (folder / RESULT).write_text(json.dumps(_result(leaderboard, folder, winner_right)))
    return study


def _write_journal(study: StudyConfig, folder: Path, done: bool) -> None:
    rng = random.Random(0)
    lines: list[tuple[float, Any]] = []
    for number in range(study.num_trials):
        point = sample(study, rng) if number else {"warm_start": 0}
        start = BEGIN + 10.0 * (number // study.hosts.num_slots)
        trial = f"t{number}"
        lines.append((start, TrialStarted(trial=trial, point={"number": number, "refused": 0, **point})))
        config = study.resolve(point)
        miss = abs(math.log10(config.optim.learning_rate) + 2.7)
        num_reports = 10 if miss < 0.6 else 3
        for n in range(1, num_reports + 1):
            values = {"loss": 0.3 + miss + 2 / n, "accuracy": 1 / (1 + miss), "train_loss": 0.2 + miss + 2 / n}
            costs = {"memory_bytes": 1e8 + 1e5 * getattr(config.method, "rank", 8), "latency_ms": 9.0 + number % 3}
            event = TrialEvaluated(
                trial=trial, n=n, step=4 * n, percent=10.0 * n, tokens=300 * n, train_s=0.8 * n,
                **values, **(costs if n == 1 else {}),
            )  # fmt: skip
            lines.append((start + 0.9 * n, event))
        if done or number < study.num_trials // 2:
            status = "done" if num_reports == 10 else "stopped"
            lines.append((start + 0.9 * num_reports, TrialEnded(trial=trial, status=status)))  # type: ignore[arg-type]
    ordered = sorted(lines, key=lambda line: line[0])
    (folder / JOURNAL).write_text(
        "".join(json.dumps({"v": 1, "time": time, **to_dict(event)}) + "\n" for time, event in ordered)
    )


def _result(leaderboard: Leaderboard, folder: Path, winner_right: int) -> dict[str, Any]:
    finalists = leaderboard.choose_finalists()
    base = measures(20, loss=4.0)
    rows = []
    for trial in finalists:
        right = winner_right if trial is finalists[0] else 100
        best = trial.find_best(leaderboard.study.search)
        assert best is not None
        rows.append({
            "trial": trial.id, "number": trial.number, "name": trial.config.name, "method": trial.method,
            "point": trial.point, "costs": trial.costs, "on_front": trial in leaderboard.find_front(),
            "validation": {"loss": best.loss, "accuracy": best.accuracy, "metric": None, "step": best.step},
            "scorecard": {"result": measures(right, loss=best.loss), "base": base, **COSTS},
            "published": [f"{leaderboard.study.name}@1"] if trial is finalists[0] else [], "error": None,
        })  # fmt: skip
    starts = {trial.id: BEGIN + 10.0 * (trial.number // 4) for trial in leaderboard.trials.values()}
    seats = [
        Seat(trial.id, trial.number % 4, starts[trial.id], starts[trial.id] + 0.9 * len(trial.curve))
        for trial in leaderboard.trials.values()
    ]
    first = next(row for row in rows if row["point"].get("warm_start") == 0)
    host = HostReport(
        label="host-1", num_slots=4, occupancy=0.9, tokens=9000, train_s=30.0, memory_bytes=400_000_000, seats=seats,
        members=0, seated=0, training=0, waiting=0,
    )  # fmt: skip
    return {
        "status": "done", "name": leaderboard.study.name, "study": str(folder), "results": str(folder / RESULTS),
        "counts": leaderboard.count_by_status(), "num_refused": 0, "priors": {"told": 0, "skipped": {}},
        "tokens": leaderboard.tokens, "hosts": [asdict(host)], "winner": rows[0], "front": [], "baseline": first,
        "finalists": rows, "registry": str(folder.parent.parent / "registry"), "beats_baseline": True,
    }  # fmt: skip
