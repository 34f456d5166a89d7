"""What `compare` decides before anything starts, and the studies that it makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import rankloom as rl
from rankloom.comparison.studies import (
    build_rates_study,
    build_seeds_study,
    choose_rates,
    get_comparison_folder,
    rank_methods,
)
from rankloom.config import CompareConfig, dump, parse
from rankloom.errors import ConfigError
from rankloom.events import TrialEnded, TrialEvaluated, TrialStarted
from rankloom.search.leaderboard import Leaderboard


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "cmp",
        "trial": {
            "model": {"id": str(tiny_llama)}, "budget": {"steps": 4}, "compute": {"device": "cpu"},
            "output": {"root": str(tmp_path)},
        },
        "methods": ["lora", "dora", {"recipe": "lora", "name": "r4", "method": {"rank": 4}}],
        "seeds": [3, 5],
    }  # fmt: skip


def board_of(study: rl.StudyConfig, losses: list[float | None]) -> Leaderboard:
    board = Leaderboard(study)
    for number, loss in enumerate(losses):
        board.add(TrialStarted(trial=f"t{number}", point={"warm_start": number, "number": number, "refused": 0}))
        if loss is not None:
            board.add(
                TrialEvaluated(
                    trial=f"t{number}", n=1, step=4, percent=100.0, loss=loss, train_loss=1.0, tokens=9, train_s=1.0
                )
            )
        board.add(TrialEnded(trial=f"t{number}", status="done" if loss is not None else "failed"))
    return board


def test_the_studies_have_no_searcher_but_every_trial(settings: dict[str, Any], tmp_path: Path) -> None:
    comparison = parse(CompareConfig, settings | {"tune": 3})
    rates = build_rates_study(comparison)
    assert rates.num_trials == 9
    assert [rates.resolve({"warm_start": i}).optim.learning_rate for i in range(3)] == [0.000316, 0.001, 0.00316]
    study = build_seeds_study(comparison, {"lora": 1e-3, "dora": 2e-3, "r4": 3e-3})
    trials = [study.resolve({"warm_start": i}) for i in range(study.num_trials)]
    assert [trial.seed for trial in trials] == [3, 5] * 3
    assert [trial.optim.learning_rate for trial in trials] == [1e-3, 1e-3, 2e-3, 2e-3, 3e-3, 3e-3]
    assert [study.get_label({"warm_start": i}) for i in range(6)] == ["lora", "lora", "dora", "dora", "r4", "r4"]
    assert study.scheduler.type == "fifo"
    assert trials[0].output.root == str(tmp_path / "comparisons" / "cmp")
    assert trials[0].output.registry_root == f"{tmp_path}/registry"


def test_the_best_rate_is_of_the_validation_rows_and_an_end_is_doubted(settings: dict[str, Any]) -> None:
    comparison = parse(CompareConfig, settings | {"tune": 3})
    board = board_of(build_rates_study(comparison), [3.0, 1.0, 2.0, 1.0, 2.0, 3.0, None, None, None])
    rates, notes = choose_rates(comparison, board)
    assert rates == {"lora": 0.001, "dora": 0.000316, "r4": 0.001}
    assert notes == [
        "dora: its best learning rate, 0.000316, is the lowest tried; another may be better",
        "r4: every learning rate failed; the recommended 0.001 is used",
    ]


def test_the_leader_is_the_best_on_average_not_by_one_lucky_seed(settings: dict[str, Any]) -> None:
    comparison = parse(CompareConfig, settings)
    study = build_seeds_study(comparison, {"lora": 1e-3, "dora": 1e-3, "r4": 1e-3})
    assert rank_methods(comparison, board_of(study, [0.1, 3.0, 1.0, 1.1, None, 0.05])) == ["dora", "lora", "r4"]


def test_a_comparison_is_not_started_twice_nor_resumed_changed(settings: dict[str, Any]) -> None:
    comparison = parse(CompareConfig, settings)
    with pytest.raises(ConfigError, match="--resume: no comparison 'cmp'"):
        rl.compare(comparison, resume=True)
    folder = get_comparison_folder(comparison)
    journal = folder / "studies" / "cmp" / "journal.jsonl"
    journal.parent.mkdir(parents=True)
    with pytest.raises(ConfigError, match="does not hold a rankloom comparison"):
        rl.compare(comparison)
    journal.write_text('{"event": "report"}\n')
    (folder / "compare.yaml").write_text(yaml.safe_dump(dump(comparison)))
    with pytest.raises(ConfigError, match=r"comparison 'cmp' exists at .*--resume continues it"):
        rl.compare(comparison)
    with pytest.raises(ConfigError, match=r"differ.*seeds: \[3, 5\] -> \[3, 5, 7\]"):
        rl.compare(settings | {"seeds": [3, 5, 7]}, resume=True)
    result = {"status": "done", "name": "cmp", "folder": str(folder), "verdict": ["It is done."]}
    (folder / "result.json").write_text(json.dumps(result))
    assert rl.compare(comparison, resume=True).verdict == ("It is done.",)


def test_bad_input_leaves_no_trace(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["trial"] |= {"data": {"train": str(tmp_path / "none.csv")}}
    with pytest.raises(rl.RankloomError, match=r"none\.csv"):
        rl.compare(settings)
    settings["trial"] |= {"data": {}, "output": {"root": "s3://bucket/x"}}
    with pytest.raises(ConfigError, match="a comparison needs a folder that all its nodes share"):
        rl.compare(settings)
    assert not (tmp_path / "comparisons").exists()
