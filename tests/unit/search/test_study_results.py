"""A study's result: its winner, front and trials, and the keys of before in JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from rankloom.hosts.host_loop import HostReport
from rankloom.search.results import StudyResult
from scorecards import COSTS

MEASURES: dict[str, Any] = {"num_rows": 8, "loss": 0.25, "perplexity": 1.28}
SCORECARD: dict[str, Any] = {
    "result": MEASURES,
    "base": MEASURES | {"loss": 2.0},
    **COSTS,
}


@pytest.fixture
def done(tmp_path: Path) -> dict[str, Any]:
    """What a study's result.json holds."""
    parquet.write_table(pa.table({"name": ["s-0000", "s-0001"], "best_loss": [0.5, 0.25]}), tmp_path / "r.parquet")
    winner = {
        "trial": "t1", "number": 1, "name": "s-0001", "method": "lora", "point": {"branch": 0, "method.rank": 8},
        "validation": {"loss": 0.25, "accuracy": None, "metric": None, "step": 6},
        "costs": {"memory_bytes": 10.0, "latency_ms": None}, "on_front": True, "scorecard": SCORECARD,
        "published": ["s@1", "s-lora@1"], "error": None,
    }  # fmt: skip
    broken = winner | {
        "trial": "t0", "number": 0, "name": "s-0000", "on_front": False, "scorecard": None, "published": [],
        "error": "<gone>",
    }  # fmt: skip
    host = HostReport(
        label="host 0", tokens=1300, num_slots=2, occupancy=1.0, members=0, seated=0, training=0, waiting=0
    )
    return {
        "status": "done", "name": "s", "study": str(tmp_path), "results": str(tmp_path / "r.parquet"),
        "counts": {"running": 0, "done": 2, "stopped": 0, "failed": 0}, "num_refused": 0,
        "priors": {"told": 0, "skipped": {}}, "tokens": 1200, "hosts": [asdict(host)],
        "winner": winner, "front": [winner], "baseline": None, "finalists": [winner, broken],
        "registry": "/out/registry", "beats_baseline": None,
    }  # fmt: skip


def test_a_studys_result_has_the_keys_of_json_and_its_trials_as_a_frame(done: dict[str, Any]) -> None:
    result = StudyResult.model_validate(done)
    assert result.winner is not None
    assert (result.adapter, result.winner.adapter) == ("s@1", "s@1")
    assert [row.trial for row in result.front] == ["t1"]
    assert list(result.trials["best_loss"]) == [0.5, 0.25]
    tree = result.to_dict()
    assert list(tree) == list(done)
    assert tree["finalists"][1] == done["finalists"][1]
    assert (tree["baseline"], tree["beats_baseline"]) == (None, None)
    assert StudyResult.model_validate(tree) == result
    stopped = {key: done[key] for key in list(done)[:9]} | {"status": "interrupted"}
    assert StudyResult.model_validate(stopped).to_dict() == stopped
    assert StudyResult.model_validate(stopped).adapter is None


def test_a_studys_result_is_short_to_read_and_escaped_in_a_notebook(done: dict[str, Any]) -> None:
    result = StudyResult.model_validate(done)
    assert repr(result) == ("StudyResult(s: done, 2 done; winner ScoredTrial(s@1 (lora): loss 0.2500 (base 2.0000)))")
    html = result._repr_html_()
    assert "<td>s-0001</td><td>lora</td><td>loss 0.2500 (base 2.0000)</td><td>yes</td><td>s@1, s-lora@1</td>" in html
    assert "&lt;gone&gt;" in html
    assert "<gone>" not in html


def test_a_result_of_the_version_before_is_read(done: dict[str, Any]) -> None:
    del done["winner"]["validation"]["metric"]  # its front and finalists are the same
    assert StudyResult.model_validate(done | {"unknown": 1}).winner is not None
