"""Results: attributes in Python, the keys of before in JSON, escaped text in a notebook."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rankloom.launch.results import EvaluationResult, TrialResult, render_html_table
from scorecards import COSTS

MEASURES: dict[str, Any] = {
    "num_rows": 8,
    "loss": 0.25,
    "perplexity": 1.28,
    "accuracy": {"value": 0.75, "low": 0.5, "high": 1.0},
}
SCORECARD: dict[str, Any] = {
    "result": MEASURES,
    "base": MEASURES | {"loss": 2.0, "accuracy": {"value": 0.25, "low": 0.0, "high": 0.5}},
    **COSTS,
}
DONE: dict[str, Any] = {
    "status": "done",
    "name": "tickets",
    "steps": 6,
    "scorecard": SCORECARD,
    "memory_bytes": 1000,
    "version": 3,
    "registry": "/out/registry",
    "adapter": "/out/registry/tickets/3",
    "run": "/out/runs/tickets",
}


def test_a_trials_result_has_the_keys_of_json_and_names_the_adapter() -> None:
    result = TrialResult.model_validate(DONE)
    assert (result.adapter, result.folder) == ("tickets@3", "/out/registry/tickets/3")
    tree = result.to_dict()
    assert list(tree) == list(DONE)
    assert {key: value for key, value in tree.items() if key != "scorecard"} == {
        key: value for key, value in DONE.items() if key != "scorecard"
    }
    assert tree["scorecard"]["extraction"] is None  # a scorecard is whole, as record.json has it
    assert TrialResult.model_validate(tree) == result
    assert TrialResult.model_validate_json(result.model_dump_json(by_alias=True)) == result


def test_a_stopped_trial_has_no_more_than_it_came_to() -> None:
    stopped = {"status": "interrupted", "name": "tickets", "steps": 3, "run": "/out/runs/tickets"}
    result = TrialResult.model_validate(stopped)
    assert result.adapter is None
    assert result.to_dict() == stopped
    assert repr(result) == "TrialResult(tickets: interrupted, 3 steps)"


def test_a_result_is_frozen_and_short_to_read() -> None:
    result = TrialResult.model_validate(DONE)
    with pytest.raises(ValidationError, match="frozen"):
        result.steps = 7  # type: ignore[misc]
    expected = "TrialResult(tickets@3: done, 6 steps, accuracy 75.0 % (base 25.0 %), loss 0.2500 (base 2.0000))"
    assert repr(result) == str(result) == expected


def test_an_evaluation_names_what_was_scored() -> None:
    of_adapter = EvaluationResult.model_validate(
        {"status": "done", "name": "tickets", "result": MEASURES, "base": SCORECARD["base"], "adapter": "tickets@3"}
    )
    assert repr(of_adapter) == "EvaluationResult(tickets@3: accuracy 75.0 % (base 25.0 %), loss 0.2500 (base 2.0000))"
    of_base = EvaluationResult.model_validate({"status": "done", "name": "t", "result": None, "base": MEASURES})
    assert repr(of_base) == "EvaluationResult(the base of t: accuracy 75.0 %, loss 0.2500)"
    assert "<th>base</th>" in of_base._repr_html_()
    assert "<th>adapter</th>" not in of_base._repr_html_()
    metric = {"name": "my:f1", "best": "max", "value": 0.5}
    judged = EvaluationResult.model_validate({"name": "t", "result": None, "base": MEASURES | {"metric": metric}})
    assert "my:f1 0.5, accuracy" in repr(judged)


def test_a_notebook_shows_a_table_in_which_no_text_is_markup() -> None:
    html = TrialResult.model_validate(DONE)._repr_html_()
    assert "<caption>tickets@3, done</caption>" in html
    assert "<tr><td>loss</td><td>0.2500</td><td>2.0000</td></tr>" in html
    table = render_html_table("<b>", ("a&b",), [("<script>",)])
    assert table == (
        "<table><caption>&lt;b&gt;</caption><thead><tr><th>a&amp;b</th></tr></thead>"
        "<tbody><tr><td>&lt;script&gt;</td></tr></tbody></table>"
    )
