"""A metric of the user's own: what it may be, what it may return, and what it is called with."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankloom.config.data import DataConfig, Source
from rankloom.config.metric import name_function
from rankloom.config.trial import EvalConfig
from rankloom.data import TaskData, load_data
from rankloom.errors import ConfigError, TrialError
from rankloom.evals.own_metric import Prediction, compute, load_metric
from rankloom.evals.score import check_metric, measure, validate

ROWS = [Prediction("say yes", "yes", "yes"), Prediction("say no", "no", "yes"), Prediction("say hm", "hm", "hm hm")]
OWN = EvalConfig(metric="python:mine", latency=False)


def overlap(rows: Sequence[Prediction]) -> list[float]:
    return [float(row.reference == row.prediction) for row in rows]


def test_a_number_is_the_value_and_a_number_a_row_has_an_interval() -> None:
    assert compute(lambda rows: len(rows) / 2, OWN, ROWS).value == 1.5
    assert compute(lambda _: np.float32(0.25), OWN, ROWS).value == 0.25
    assert compute(lambda _: torch.tensor(0.25), OWN, ROWS).value == 0.25
    found = compute(overlap, OWN, ROWS)
    assert (found.name, found.best, found.value) == ("python:mine", "max", pytest.approx(1 / 3))
    assert found.low is not None
    assert found.low == 0 < found.value < found.high  # type: ignore[operator]
    assert compute(lambda rows: np.array(overlap(rows)), OWN, ROWS) == found


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None; expected a number, or a list of 3 numbers"),
        ("0.5", "returned '0.5'"),
        (True, "returned True"),
        ([1.0, 2.0], "returned list of 2"),
        ([1.0, "x", 2.0], "returned list of 3"),
        (math.nan, "not finite"),
        ([0.0, math.inf, 0.0], "not finite"),
    ],
)
def test_what_is_no_number_is_refused(returned: Any, message: str) -> None:
    with pytest.raises(TrialError, match=rf"eval\.metric: python:mine.*{message}"):
        compute(lambda _: returned, OWN, ROWS)


def test_a_metric_that_raises_is_named() -> None:
    with pytest.raises(TrialError, match=r"eval\.metric: python:mine failed: ZeroDivisionError"):
        compute(lambda rows: len(rows) / 0, OWN, ROWS)


def test_a_function_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics.py").write_text(
        "import sys\nTEXT = 'no function'\ndef f1(rows):\n    return 0.5\ndef two(rows, more):\n    return 1\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    function = load_metric("my_metrics:f1")
    assert function is not None
    assert function([]) == 0.5
    assert name_function(function) == "my_metrics:f1"
    assert load_metric("loss") is load_metric("accuracy") is None
    for name, message in (
        ("my_metrics:f2", "'my_metrics:f2' can't be imported: AttributeError"),
        ("my_metric:f1", "'my_metric:f1' can't be imported: ModuleNotFoundError"),
        ("my_metrics:TEXT", "my_metrics:TEXT is a str; expected a function"),
        ("my_metrics:two", "my_metrics:two must take one argument"),
        ("python:f1", "'python:f1' was a function that Python code handed over; hand it over again"),
    ):
        with pytest.raises(ConfigError, match=rf"eval\.metric: {message}"):
            load_metric(name)


def test_what_only_this_process_has_goes_by_its_mere_name() -> None:
    assert name_function(overlap) == f"{__name__}:overlap"
    assert name_function(lambda _: 1.0) == "python:test_what_only_this_process_has_goes_by_its_mere_name_locals_lambda"


def test_names_and_modes_are_checked() -> None:
    for tree, message in (
        (
            {"metric": "acuracy"},
            "expected loss, accuracy, or a function of your own as module:function .given 'acuracy'",
        ),
        ({"metric": "a b:c"}, "expected loss"),
        ({"metric": "accuracy", "mode": "min"}, "mode: accuracy is best at its max"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalConfig(**tree)  # type: ignore[arg-type]
    assert [EvalConfig(metric="m:f").best, EvalConfig(metric="m:f", mode="min").best, EvalConfig().best] == [
        "max", "min", "min"
    ]  # fmt: skip


def task(folder: Path, tokenizer: Any, rows: list[dict[str, str]]) -> TaskData:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(path=str(file))
    return load_data(DataConfig(train=source, validation=source, test=source), tokenizer)


@pytest.mark.parametrize("labelled", [False, True])
def test_it_is_called_with_every_row(tiny_llama: Path, tmp_path: Path, labelled: bool) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    rows = [{"text": f"card {n}", "label": ["lost", "found"][n % 2]} for n in range(6)] if labelled else [
        {"prompt": f"card {n}", "completion": f"lost {n}"} for n in range(6)
    ]  # fmt: skip
    data, asked = task(tmp_path, tokenizer, rows), []

    def own(predictions: Sequence[Prediction]) -> list[float]:
        asked.append(list(predictions))
        return overlap(predictions)

    check_metric(OWN, tokenizer, data, own)
    assert all(row.reference == row.prediction for row in asked.pop())
    found = measure(model, tokenizer, data, OWN, own)
    (called,) = asked
    assert [f"card {n}" in row.prompt for n, row in enumerate(called)] == [True] * 6
    assert [row.reference for row in called] == [row["label" if labelled else "completion"] for row in rows]
    proportion = found.accuracy if labelled else found.exact_match
    assert found.metric is not None
    assert proportion is not None
    assert found.metric.value == pytest.approx(proportion.value)
    part = validate(model, data.validation, data, OWN, tokenizer, (0, 1))
    assert part.predictions == called
    if labelled:
        halves = [validate(model, data.validation, data, OWN, tokenizer, (rank, 2)).predictions for rank in (0, 1)]
        assert [halves[n % 2][n // 2] for n in range(6)] == called


def test_plain_text_has_nothing_to_predict(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    data = task(tmp_path, tokenizer, [{"text": f"the weather is fine {n}"} for n in range(6)])
    with pytest.raises(ConfigError, match=r"eval\.metric: .* needs rows with prompts"):
        check_metric(OWN, tokenizer, data, overlap)
