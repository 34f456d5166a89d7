"""Rows that Python code hands over give what a file with them gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from rankloom.config import StudyConfig, TrialConfig, parse
from rankloom.config.data import DataConfig, Source
from rankloom.config.model import ModelConfig
from rankloom.data import load_data
from rankloom.data.from_python import write_rows_files
from rankloom.errors import ConfigError, DataError
from rankloom.launch.handed_over import use_study_rows, use_trial_rows, write_rows
from rankloom.models import load_tokenizer

ROWS = [{"text": f"card {n}", "label": ["lost", "found"][n % 2]} for n in range(40)]
CHATS = [
    {"messages": [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "yes", "weight": 1}]}
    for n in range(40)
]


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["classification", "chat"])
@pytest.mark.parametrize("kind", [list, pandas.DataFrame, datasets.Dataset.from_list], ids=["list", "frame", "dataset"])
def test_all_kinds_equal_a_file(kind: Any, rows: list[dict[str, Any]], tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(id=str(tiny_llama)))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = load_data(DataConfig(train=Source(path=str(file))), tokenizer)
    paths = write_rows(kind(rows), str(tmp_path / "root"))
    found = load_data(DataConfig(train=Source(path=paths["train"])), tokenizer)
    assert found.fingerprint == expected.fingerprint
    assert write_rows(kind(rows), str(tmp_path / "root")) == paths  # the same rows have the same file
    assert write_rows(kind(rows[1:]), str(tmp_path / "root")) != paths


def test_a_class_label_keeps_its_names_and_a_selection_its_rows(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(id=str(tiny_llama)))
    whole = datasets.Dataset.from_list(ROWS).class_encode_column("label").shuffle(seed=1).select(range(30))
    paths = write_rows({"train": whole, "test": ROWS[:4]}, str(tmp_path))
    found = load_data(DataConfig(**{role: Source(path=path) for role, path in paths.items()}), tokenizer)  # type: ignore[arg-type]
    assert found.labels is not None
    assert set(found.labels) == {"lost", "found"}
    assert len(found.test) == 4
    assert len(found.train) + len(found.validation) == 30


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("rows.csv", ConfigError, "data: expected a datasets.Dataset, .* .given str."),
        ([{"text": "a"}, 5], ConfigError, "data: expected .* .given list."),
        ({"training": ROWS}, ConfigError, "data: unknown key 'training'; allowed: train, validation, test"),
        ({}, ConfigError, "data: an empty mapping"),
        ({"test": []}, DataError, r"data\['test'\]: has no rows"),
        ([{"text": "a"}, {"text": object()}], DataError, r"data\[1\]: can't be written as JSON"),
        ([{"text": float("nan")}], DataError, r"data\[0\]: can't be written as JSON"),
        (pandas.DataFrame({"text": ["a", {"b": 1}]}), DataError, "data: the DataFrame can't be written"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        write_rows_files(given)


def test_a_config_names_the_files(tmp_path: Path) -> None:
    output = {"root": str(tmp_path)}
    trial = parse(TrialConfig, {"name": "t", "output": output, "data": {"columns": {"label": "category"}}})
    told = use_trial_rows(trial, {"train": ROWS, "validation": ROWS[:10]})
    assert Path(told.data.train.path).parent == tmp_path / "data"
    assert told.data.validation is not None
    assert told.data.columns == {"label": "category"}
    assert use_trial_rows(trial, None) is trial
    study = parse(StudyConfig, {"name": "s", "trial": {"output": output}, "space": [{"optim": {"batch_size": 4}}]})
    assert use_study_rows(study, ROWS).baseline.data.train == use_trial_rows(trial, ROWS).data.train
    elsewhere = study.model_copy(update={"space": [{"data": {"train": "x.csv"}}]})
    with pytest.raises(ConfigError, match=r"data\.train: the study's space names rows too"):
        use_study_rows(elsewhere, ROWS)
