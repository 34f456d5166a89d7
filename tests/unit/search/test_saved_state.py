"""Ray Tune's state survives a disk that fills up while Tune writes it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from rankloom.search.saved_state import keep_state, mend_state

TRIALS, SEARCHER = "experiment_state-2026-11-28_10-00-00.json", "searcher-state-2026-11-28_10-00-00.pkl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as Tune's, with the states of two runs."""
    folder = tmp_path / "tune"
    folder.mkdir()
    (folder / TRIALS.replace("28_10", "27_10")).write_text("cut sh")
    (folder / TRIALS).write_text(json.dumps({"trial_data": [1, 2]}))
    (folder / SEARCHER).write_bytes(pickle.dumps({"number": 2}))
    return folder


@pytest.mark.parametrize("name", [TRIALS, SEARCHER])
def test_a_state_that_was_cut_short_is_put_back(folder: Path, name: str) -> None:
    keep_state(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / name).write_bytes(before[name][:-3])
    keep_state(folder)  # does not keep this one
    mend_state(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_whole_state_stays_as_it_is(folder: Path) -> None:
    keep_state(folder)
    (folder / TRIALS).write_text(json.dumps({"trial_data": [1, 2, 3]}))
    mend_state(folder)
    assert json.loads((folder / TRIALS).read_text()) == {"trial_data": [1, 2, 3]}


def test_without_a_copy_nothing_changes(folder: Path) -> None:
    (folder / TRIALS).write_text("cut sh")
    mend_state(folder)
    assert (folder / TRIALS).read_text() == "cut sh"
