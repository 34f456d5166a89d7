"""The examples of what users bring themselves run, on a tiny model."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from rankloom.errors import ConfigError
from rankloom.registry import Registry

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def trial_of(model: Path, root: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {"id": str(model)},
        "data": {"max_train_rows": 48, "template": "plain"},
        "optim": {"learning_rate": 3e-3, "batch_size": 8},
        "budget": {"steps": 6},
        "eval": {"every": 3, "max_rows": 12, "max_test_rows": 12, "latency": False},
        "compute": {"num_workers": 0},
        "output": {"root": str(root)},
    }


def test_own_metric(tiny_llama: Path, tmp_path: Path) -> None:
    result = runpy.run_path(str(EXAMPLES / "own_metric.py"))["main"](trial_of(tiny_llama, tmp_path))
    measured, base = result.scorecard.result, result.scorecard.base
    assert measured.metric.name == "python:family"
    assert measured.metric.low <= measured.metric.value <= measured.metric.high
    assert measured.metric.value >= measured.accuracy.value
    assert base.metric is not None
    assert Registry(tmp_path / "registry").get("tiny").trial["eval"]["metric"] == "python:family"


def test_own_data_is_found_again_to_resume(tiny_llama: Path, tmp_path: Path) -> None:
    module = runpy.run_path(str(EXAMPLES / "own_data.py"))
    result = module["main"](trial_of(tiny_llama, tmp_path))
    assert result.scorecard.result.num_rows == 12
    import rankloom as rl

    rows = {"train": module["ROWS"][:90], "test": module["ROWS"][90:]}
    assert rl.train(trial_of(tiny_llama, tmp_path), data=rows, resume=True).adapter == result.adapter
    with pytest.raises(ConfigError, match=r"data\.train\.path: .* -> "):
        rl.train(trial_of(tiny_llama, tmp_path), data=rows | {"train": rows["train"][1:]}, resume=True)
