"""A study's trials as Optuna's: states, values, parameters by branch, times; and a file that Optuna opens."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from made_study import BEGIN, make_study
from rankloom.config import StudyConfig, load
from rankloom.events import TrialStarted
from rankloom.search.leaderboard import Leaderboard
from rankloom.search.optuna_storage import build_optuna, read_times, write_optuna


def test_optuna_opens_the_file_with_all_that_the_study_knows(tmp_path: Path) -> None:
    folder = tmp_path / "studies" / "made"
    study = make_study(folder, num_trials=12)
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.log")))
    stored = optuna.load_study(study_name="made", storage=storage)
    board = Leaderboard.read(study, folder / "journal.jsonl")
    assert [direction.name for direction in stored.directions] == ["MINIMIZE"] * 3
    assert stored.metric_names == ["loss", "memory_bytes", "latency_ms"]
    for trial, mine in zip(stored.trials, board.trials.values(), strict=True):
        best = mine.find_best(study.search)
        assert best is not None
        assert trial.values == [best.loss, mine.costs["memory_bytes"], mine.costs["latency_ms"]]
        assert trial.state.name == {"done": "COMPLETE", "stopped": "PRUNED"}[mine.status]
        assert trial.intermediate_values == {point.step: point.loss for point in mine.reports}
        assert trial.user_attrs["name"] == mine.config.name
        if "branch" in mine.point:
            branch = mine.point["branch"]
            drawn = {f"{branch}:{name}": value for name, value in mine.point.items() if name != "branch"}
            assert trial.params == {"branch": branch} | drawn
            assert trial.distributions[f"{branch}:optim.learning_rate"].log
        else:
            assert trial.params == {}
    assert stored.trials[0].datetime_start == datetime.fromtimestamp(BEGIN)
    assert all(trial.datetime_complete > trial.datetime_start for trial in stored.trials)  # type: ignore[operator]
    assert not (folder / "optuna.staged").exists()


def test_a_trial_that_left_the_space_is_kept_without_parameters(tmp_path: Path) -> None:
    folder = tmp_path / "studies" / "made"
    study = make_study(folder, num_trials=4)
    board = Leaderboard.read(study, folder / "journal.jsonl")
    point = {"branch": 1, "method.rank": 8, "optim.learning_rate": 0.9}  # above the space
    board.add(TrialStarted(trial="t9", point={"number": 9, "refused": 0} | point))
    last = build_optuna(board, read_times(folder / "journal.jsonl")).trials[-1]
    assert (last.params, last.state.name) == ({}, "RUNNING")


def test_a_journal_of_the_last_version_has_no_times(last_version: Path) -> None:
    folder = last_version / "studies" / "finished"
    board = Leaderboard.read(load(StudyConfig, folder / "study.yaml"), folder / "journal.jsonl")
    write_optuna(board, folder / "journal.jsonl", folder / "optuna.log")
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.log")))
    assert len(optuna.load_study(study_name="finished", storage=storage).trials) == 2


def test_it_needs_no_ray_and_no_torch() -> None:
    code = "import sys, rankloom.search.optuna_storage; print(sorted({'ray', 'torch'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
