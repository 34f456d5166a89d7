"""From stored results to the table, the tests and the words."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from rankloom.comparison.export import export
from rankloom.comparison.page import make_page
from rankloom.comparison.results import CompareResult
from rankloom.comparison.table import find_servers
from rankloom.errors import TrialError
from rankloom.pages.html import render
from rankloom.pages.png import write_pngs
from rankloom.reporting.comparison import make_comparison_page
from rankloom.search.finalists import get_rows_file


def test_the_table_has_a_row_for_each_method_and_for_the_base(left: Callable) -> None:
    result = left({"lora": [0.9, 0.88], "dora": [0.92, 0.9], "full": [0.5, 0.52]}).result()
    assert [method.name for method in result.methods] == ["dora", "lora", "full"]  # by the validation rows
    dora, _, full = result.methods
    assert (result.measure, result.best, result.num_rows) == ("accuracy", "max", 60)
    assert dora.seeds == (0, 1)
    assert dora.accuracy.low < dora.accuracy.value < dora.accuracy.high
    assert dora.accuracy.value == pytest.approx(0.91, abs=0.03)
    assert dora.macro_f1.value == pytest.approx(dora.accuracy.value, abs=0.03)
    assert (dora.tokens, dora.train_s, dora.all_train_s, dora.num_trials) == (800, 2.0, 4.0, 2)
    assert (dora.learning_rate, dora.adapter_bytes, dora.latency_ms) == (1e-3, 2_000_000, 5.0)
    assert dora.retention_loss == 3.0
    assert dora.adapter == "cmp-dora@1"
    assert dora.served_by == ("rankloom", "PEFT", "vLLM")
    assert full.served_by == ("rankloom", "PEFT", "vLLM")
    assert full.energy == 0.9
    assert full.before_extraction > full.accuracy.value
    assert dora.before_extraction is None
    assert dora.cost.peak_bytes == 20_000_000
    [base] = result.bases
    assert base.name == "base"
    assert base.accuracy.value == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    ("config", "tensor", "quantization", "by_vllm"),
    [
        ({}, "q.lora_A.weight", "none", True),
        ({"use_dora": True}, "q.lora_magnitude_vector", "none", True),
        ({"use_dora": True}, "q.lora_magnitude_vector", "nf4", False),
        ({}, "embed.lora_embedding_A", "none", False),
        ({"modules_to_save": ["norm"]}, "norm.weight", "none", False),
        ({"target_parameters": ["experts.up"]}, "experts.lora_A.weight", "none", False),
    ],
)
def test_vllm_serves_lora_and_dora_on_linears_of_a_plain_base(
    tmp_path: Path, config: dict, tensor: str, quantization: str, by_vllm: bool
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.{tensor}": np.zeros((1, 2))}, tmp_path / "adapter_model.safetensors")
    assert find_servers(tmp_path, quantization) == ["rankloom", "PEFT", *(["vLLM"] if by_vllm else [])]


def test_a_tie_is_not_called_a_win(left: Callable) -> None:
    result = left({"lora": [0.9, 0.88, 0.9], "dora": [0.92, 0.88, 0.9], "full": [0.4, 0.42, 0.4]}).result()
    assert result.leader.name == "dora"
    assert result.winner is None
    assert result.leader.better_than == ("full",)
    assert {test.is_real for test in result.tests if "full" not in (test.first, test.second)} == {False}
    first, *others = result.verdict
    assert first.startswith("dora leads on the validation rows: accuracy ")
    assert first.endswith("There lora is not told apart from it, so this is a tie. It is better than full.")
    assert "3 seeds and 60 test rows; 2 of 3 pairs of methods differ" in others[0]
    assert any(text == "Of the tied methods lora takes the least memory (10 MB) and trains fastest (100 tokens/s)."
               for text in others)  # fmt: skip
    assert "is better than every" not in " ".join(result.verdict)


def test_a_clear_winner_is_called_one(left: Callable) -> None:
    result = left({"lora": [0.9, 0.91, 0.9], "dora": [0.5, 0.51, 0.52], "full": [0.45, 0.44, 0.42]}).result()
    assert result.winner.name == "lora"
    assert result.verdict[0].startswith("lora is better than every other method: accuracy 9")
    assert set(result.methods[0].better_than) == {"dora", "full"}
    assert result.methods[1].worse_than == ("lora",)


def test_the_test_rows_may_contradict_the_validation_rows(left: Callable) -> None:
    made = left({"lora": [0.9, 0.9, 0.91], "dora": [0.4, 0.4, 0.42]})
    for state in made.leaderboard.trials.values():
        state.curve[1] = replace(state.curve[1], loss=0.01 if state.method == "dora" else 0.9)
    result = made.result()
    assert result.leader.name == "dora"
    assert result.winner is None
    assert "On the test rows lora is better than it." in result.verdict


def test_a_failed_seed_is_told_and_its_method_tested_on_the_others(left: Callable) -> None:
    result = left({"lora": [0.9, 0.9, 0.9], "dora": [0.95, None, 0.95], "full": [None, None, None]}).result()
    lora, dora, full = result.methods  # with fewer seeds, behind
    assert (lora.name, dora.seeds, full.seeds) == ("lora", (0, 2), ())
    assert dora.errors == ("seed 1: the loss is not finite",)
    assert full.accuracy is None
    [test] = result.tests
    assert test.num_seeds == 2
    assert result.winner is None


def test_one_seed_says_so(left: Callable) -> None:
    result = left({"lora": [0.9], "dora": [0.4]}).result()
    assert result.tests[0].test == "McNemar"
    assert "With one seed" in result.verdict[-1]


def test_an_accuracy_like_the_bases_is_told(left: Callable) -> None:
    result = left({"lora": [0.9, 0.9], "dora": [0.3, 0.31]}).result()
    assert "The interval of dora overlaps that of the untuned base." in result.verdict


def test_trials_for_learning_rates_are_counted(left: Callable) -> None:
    made = left({"lora": [0.9, 0.9], "dora": [0.9, 0.9]})
    result = made.result(tuning=made.leaderboard)  # as if each method had had two more
    assert [method.num_trials for method in result.methods] == [4, 4]
    assert [method.all_train_s for method in result.methods] == [8.0, 8.0]


def test_rows_that_do_not_belong_together_are_refused(left: Callable) -> None:
    made = left({"lora": [0.9, 0.9], "dora": [0.9, 0.9]})
    file = get_rows_file(Path(made.trained.folder), "t1")
    file.write_bytes(b"cut off")
    with pytest.raises(TrialError, match="can't be read"):
        made.result()
    file.unlink()
    with pytest.raises(TrialError, match="can't be read"):
        made.result()


def test_the_files_say_what_the_result_says(left: Callable, tmp_path: Path) -> None:
    result = left({"lora": [0.9, 0.88], "dora": [0.92, 0.9]}).result()
    export(result, tmp_path)
    assert CompareResult.model_validate_json((tmp_path / "result.json").read_text()) == result
    assert make_comparison_page(tmp_path) == make_page(result)
    rows = pq.read_table(tmp_path / "table.parquet").to_pylist()
    assert [row["name"] for row in rows] == ["dora", "lora", "base"]
    assert rows[0]["accuracy"] == result.methods[0].accuracy.value
    assert (rows[0]["peak_bytes"], rows[2]["peak_bytes"]) == (20_000_000, None)
    with (tmp_path / "table.csv").open() as file:
        assert [row["accuracy_low"] for row in csv.DictReader(file)] == [str(row["accuracy_low"]) for row in rows]
    text = (tmp_path / "table.md").read_text()
    assert result.verdict[0] in text
    assert "| dora | 0.001 |" in text
    assert (tmp_path / "tests.csv").read_text().splitlines()[0].startswith("first,second,difference,p_value,adjusted")
    assert list(result.table.columns) == list(rows[0])
    assert json.loads((tmp_path / "result.json").read_text())["verdict"] == list(result.verdict)
    assert "lora" in result._repr_html_()


def test_the_page_has_the_words_the_tables_and_the_charts(left: Callable, tmp_path: Path) -> None:
    result = left({"lora": [0.9, 0.88], "dora": [0.92, 0.9]}).result()
    page = make_page(result)
    assert page.summary == result.verdict
    assert [chart.id for chart in page.charts] == ["quality", "memory", "trade"]
    assert {file.read_bytes()[:4] for file in write_pngs(page, tmp_path)} == {b"\x89PNG"}  # each can be drawn
    text = render(page)
    assert "dora leads on the validation rows" in text
    assert "rankloom adapters promote cmp-dora@1" in text
