"""The benchmarks that need no minutes: operations are counted, and the GPU's runs at toy sizes on a CPU."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rankloom import kernels
from rankloom.kernels import norms

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
Run = Callable[..., str]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process import the benchmarks, which may change torch's threads."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a benchmark with a command line's arguments and returns what it prints."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        assert not importlib.import_module(script).main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def launches() -> Any:
    return importlib.import_module("launches")


def test_what_launches_nothing_is_not_counted(launches: Any) -> None:
    x, many, linear = torch.ones(4, 4), [torch.ones(1) for _ in range(100)], torch.nn.Linear(4, 4)
    with launches.LaunchCount() as count:
        made = torch.empty(4, 4).copy_(x)
        made.view(2, 8)[:, :4].T.add_(1).reshape(-1)  # the reshape copies
        linear(x)
        torch._foreach_mul_(many, 2)
        with torch.inference_mode():
            linear(x).flatten()
    assert count.launches == {"copy_": 1, "add_": 1, "clone": 1, "addmm": 1, "linear": 1, "_foreach_mul_": 3}


def test_an_operation_of_several_launches_counts_as_often(launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.LAUNCHES, "rms_norm_forward", 3)
    x, weight = torch.ones(4, 4), torch.ones(4)
    with launches.LaunchCount() as count:
        norms.rms_norm_forward(x, weight, 1e-5)
    assert count.launches == {"rms_norm_forward": 3}  # and nothing of its reference


def test_a_step_on_a_gpu_takes_few_launches_a_layer(run: Run) -> None:
    found = json.loads(run("launches", "--json").splitlines()[-1])
    assert set(found) == {"train_lora", "train_dora", "decode_16_adapters"}
    assert 0 < found["train_lora"] <= 130
    assert found["train_lora"] < found["train_dora"] <= 200
    assert 0 < found["decode_16_adapters"] <= 22  # q, k, v and gate, up are a product each


def test_the_gpus_benchmark_runs_dry_and_continues(run: Run, tmp_path: Path) -> None:
    def rows() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    run("gpu", "--dry", "--out", str(tmp_path), "floors", "study")
    before = rows()
    assert [row["section"] for row in before if "done_s" in row] == ["floors", "study"]
    run("gpu", "--dry", "--out", str(tmp_path))
    assert rows()[: len(before)] == before
    assert not {"floors", "study"} & {row["section"] for row in rows()[len(before) :]}
    goals = importlib.import_module("gpu_bench").GOALS
    assert {row["goal"] for row in rows() if "goal" in row} == {goal for goal in goals if "memory" not in goal}
    table = (tmp_path / "table.md").read_text()
    assert all(goal.what in table for goal in goals.values())
