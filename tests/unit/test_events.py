"""Events: every kind goes through a line of JSON and back, and lines of other versions are read or refused by name."""

from __future__ import annotations

import ast
import itertools
import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from rankloom import events
from rankloom.errors import RankloomError
from rankloom.events import (
    KINDS,
    DataLoaded,
    Evaluated,
    Event,
    FinalistScored,
    HostStatus,
    LeaderboardRow,
    PhaseStarted,
    RunFinished,
    RunResumed,
    StepFinished,
    StudyFinished,
    StudyProgress,
    StudyStatus,
    TrialEnded,
    TrialEvaluated,
    TrialStarted,
    WarningRaised,
    from_dict,
    read_events,
    to_dict,
    to_line,
)

STEP = StepFinished(
    step=3, total_steps=9, epoch=0.5, loss=1.23456789, learning_rate=1e-4, tokens=99, tokens_per_s=12.5,
    memory_bytes=10**9, eta_s=4.0,
)  # fmt: skip
HOST = HostStatus(label="host-1", num_slots=4, members=3, training=2, waiting=1, occupancy=0.5, tokens=9, train_s=2.0)
ROW = LeaderboardRow(name="s-0001", method="lora", settings="rank 4", status="running", value=0.5, percent=25.0)
BEST = FinalistScored(
    trial="t1", name="s-0001", method="lora", step=9, scorecard={"result": {"loss": 0.5}}, published=["s@1"]
)  # fmt: skip
EXAMPLES: list[Event] = [
    PhaseStarted("data", "reading rows.csv"),
    WarningRaised("the chat template rewrites history"),
    DataLoaded({"format": "text", "splits": {}, "overlaps": {}, "warnings": []}),
    RunResumed(2),
    STEP,
    Evaluated(step=3, loss=0.5, accuracy=0.75, best=True),
    RunFinished(status="done", name="tickets", steps=9, scorecard={"result": {"loss": 0.5}}, version=1),
    TrialStarted(trial="t1", name="s-0001", method="lora", point={"number": 1, "refused": 0, "method.rank": 4}),
    TrialEvaluated(trial="t1", n=1, step=3, percent=25.0, loss=0.5, train_loss=0.7, tokens=9, train_s=0.1, best=True),
    TrialEnded(trial="t1", name="s-0001", method="lora", status="failed", error="training diverged"),
    StudyStatus(
        metric="loss", total=4, counts={"running": 1, "done": 0, "stopped": 0, "failed": 0}, refused=0,
        rungs=[(10.0, 2)], best=[ROW], tokens=9, share=0.25, hosts=[HOST], elapsed_s=1.5,
    ),
    StudyProgress(step=1, best=None, tokens=9),
    StudyFinished(
        name="s", study="/studies/s", winner=BEST, finalists=[BEST], registry="/registry", beats_baseline=True
    ),
]  # fmt: skip


def test_there_is_an_example_of_every_kind() -> None:
    assert [type(event) for event in EXAMPLES] == list(KINDS.values())


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.kind)
def test_an_event_goes_through_json_and_pickle(event: Event, tmp_path: Path) -> None:
    line = json.loads(to_line(event))
    assert line["v"] == events.VERSION
    assert line["event"] == event.kind
    assert {each.name for each in fields(event)} == line.keys() - {"v", "time", "event"}
    assert from_dict(line) == from_dict(to_dict(event)) == event
    assert pickle.loads(pickle.dumps(event)) == event
    (tmp_path / "events.jsonl").write_text(f"{to_line(event)}\n" * 2)
    assert list(read_events(tmp_path / "events.jsonl")) == [event, event]


def test_every_field_says_what_it_is() -> None:
    """The reference of the files is made of these docstrings."""
    for node in ast.walk(ast.parse(Path(events.__file__).read_text())):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for field, after in itertools.pairwise([*node.body, None]):
                if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
                    assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(field.target)}"


def test_an_event_prints_in_a_line_without_what_it_does_not_know() -> None:
    assert str(RunResumed(2)) == "resumed  step=2"
    assert "loss=1.235" in str(STEP)
    assert "grad_norm" not in str(STEP)
    assert len(str(DataLoaded({"labels": ["x" * 99] * 99}))) < 200
    with pytest.raises(AttributeError):
        STEP.loss = 0.0  # type: ignore[misc]


def test_lines_of_the_last_version_and_fields_of_a_later_one_are_read(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    old = to_dict(STEP) | {"time": 1.0}
    file.write_text(f'{json.dumps(old)}\n{{"event": "st\n{json.dumps(old | {"v": 1, "field_of_tomorrow": [1]})}\n')
    assert list(read_events(file)) == [STEP, STEP]


def test_a_finished_study_of_the_last_version_is_read() -> None:
    row = {
        "trial": "t1", "number": 1, "name": "s-0001", "method": "lora", "point": {}, "published": ["s@1"],
        "validation": {"loss": 0.4, "step": 9}, "scorecard": {"result": {"loss": 0.5}}, "error": None,
    }  # fmt: skip
    result = {"status": "done", "name": "s", "study": "/studies/s", "tokens": 9, "registry": "/registry"}
    result |= {"beats_baseline": True, "winner": row, "finalists": [row]}
    assert from_dict({"event": "study_done", "v": 1, "result": result}) == EXAMPLES[-1]
    ranked = from_dict({"event": "study_done", "result": {"name": "s", "study": "/studies/s"}})
    assert ranked == StudyFinished(name="s", study="/studies/s", winner=None, finalists=[])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"v": 2}, r"line 1: events of schema v=2, and this rankloom reads v=1; update rankloom"),
        ({"event": "stpe"}, r"event='stpe': unknown kind of event; known are phase, .*study_done"),
        ({"loss": "low"}, r"line 1: event=step: loss: Input should be a valid number"),
    ],
)
def test_a_line_that_is_no_event_is_refused_by_name(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text(json.dumps(to_dict(STEP) | changed))
    with pytest.raises(RankloomError, match=message):
        list(read_events(file))
