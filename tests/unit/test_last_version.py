"""Nothing that the last version wrote is lost: its registry opens, its runs resume, its studies are priors."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from rankloom.config import StudyConfig, TrialConfig, parse
from rankloom.events import Evaluated, Event, RunResumed, StepFinished, TrialEnded, read_events
from rankloom.launch.trainer import train_trial
from rankloom.registry import Registry
from rankloom.registry.scorecard import Scorecard
from rankloom.search import tune_searcher, tuning
from rankloom.search.leaderboard import Leaderboard
from rankloom.search.priors import read_priors
from rankloom.search.results import StudyResult
from rankloom.search.saved_state import alias_moved_module, check_trials
from rankloom.search.tune_searcher import StudySearcher


def test_the_registry_opens(last_version: Path) -> None:
    registry = Registry(str(last_version / "registry"))
    assert {name: registry.versions(name) for name in registry.names()} == {"finished": [1, 2]}
    for version in (1, 2):
        record = registry.verify(f"finished@{version}")
        assert record.scorecard is not None
        assert record.scorecard.result.num_rows > 0
    assert registry.verify("finished@2").lineage.study == "finished"
    registry.promote("finished@2")
    assert registry.verify("finished@champion").version == 2


def test_the_events_of_a_run_are_read(last_version: Path) -> None:
    events = list(read_events(last_version / "runs" / "finished" / "events.jsonl"))
    assert [event.step for event in events if isinstance(event, StepFinished)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events if isinstance(event, Evaluated)] == [0, 2, 4, 6]
    assert events[-1].kind == "done"


def test_a_finished_run_gives_its_result_and_a_stopped_one_continues(last_version: Path) -> None:
    def trial(name: str) -> TrialConfig:
        return parse(TrialConfig, yaml.safe_load((last_version / "runs" / name / "trial.yaml").read_text()))

    before = json.loads((last_version / "runs" / "finished" / "result.json").read_text())
    finished = train_trial(trial("finished"), resume=True)
    assert (finished.name, finished.steps, finished.version) == ("finished", 6, before["version"])
    assert finished.to_dict()["adapter"] == before["adapter"]
    assert finished.scorecard == Scorecard.model_validate(before["scorecard"])

    events: list[Event] = []
    result = train_trial(trial("stopped"), resume=True, on_event=events.append)
    assert (result.status, result.steps) == ("done", 6)
    assert RunResumed(3) in events
    assert [event.step for event in events if isinstance(event, StepFinished)] == [4, 5, 6]
    Registry(result.registry or "").verify("stopped@1")
    written = list(read_events(last_version / "runs" / "stopped" / "events.jsonl"))
    assert [event.step for event in written if isinstance(event, StepFinished)] == [1, 2, 3, 4, 5, 6]


def study(last_version: Path, name: str) -> StudyConfig:
    return parse(StudyConfig, yaml.safe_load((last_version / "studies" / name / "study.yaml").read_text()))


def test_a_journal_is_read_and_a_searcher_restored(last_version: Path) -> None:
    board = Leaderboard.read(study(last_version, "finished"), last_version / "studies" / "finished" / "journal.jsonl")
    assert board.count_by_status() == {"running": 0, "done": 2, "stopped": 0, "failed": 0}
    assert [[point.step for point in trial.reports] for trial in board.rank_trials()] == [[2, 4, 6]] * 2
    ended = read_events(last_version / "studies" / "finished" / "journal.jsonl")
    assert {event.trial for event in ended if isinstance(event, TrialEnded)} == board.trials.keys()

    config = study(last_version, "stopped")
    searcher = StudySearcher(config)
    searcher.restore_from_dir(str(last_version / "studies" / "stopped" / "tune"))
    assert searcher.suggest("another") == "FINISHED"  # its three trials were proposed
    assert type(searcher._sampler) is type(StudySearcher(config)._sampler)


def test_a_populations_points_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rankloom.search.searchers", raising=False)
    alias_moved_module()
    assert pickle.loads(b"crankloom.search.searchers\n_Of\n.") is tune_searcher._Of


def test_the_result_of_a_study_is_read(last_version: Path) -> None:
    text = (last_version / "studies" / "finished" / "result.json").read_text()
    before, result = json.loads(text), StudyResult.model_validate_json(text)
    assert result.adapter == before["winner"]["published"][0]
    assert [row.name for row in result.finalists] == [row["name"] for row in before["finalists"]]
    assert len(result.trials) == 2


def test_the_trials_of_a_finished_study_are_priors(last_version: Path) -> None:
    folder = last_version / "studies" / "finished"
    # the trials' configs in results.parquet have their data and base where they were
    written = (folder / "study.yaml").read_text().replace(str(last_version), "/tmp/rankloom-last-version")
    earlier = parse(StudyConfig, yaml.safe_load(written))
    search = earlier.search.model_copy(update={"priors": [str(folder)]})
    found, skipped = read_priors(earlier.model_copy(update={"name": "next", "search": search}))
    assert skipped == {"not a trial of this space": 1}  # the baseline, of another rank
    [prior] = found
    assert prior.values is not None
    assert prior.values[0] == min(row["best_loss"] for row in pq.read_table(folder / "results.parquet").to_pylist())


def test_the_trials_of_a_stopped_study_are_found(last_version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = last_version / "studies" / "stopped" / "tune"
    check_trials(state)
    check_trials(last_version)  # nothing was saved there
    monkeypatch.delattr(tuning, "_id_of")  # Ray Tune would log this, and begin the study again
    with pytest.raises(AttributeError, match="_id_of"):
        check_trials(state)
