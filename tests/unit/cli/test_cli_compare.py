"""`rankloom compare`: what is refused with one line and exit code 2, and what a finished one prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankloom.cli import main
from rankloom.comparison.results import CompareResult, Estimate, MethodResult
from rankloom.config import CompareConfig, dump, parse
from rankloom.config.paths import resolve_paths


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    trial = {"model": {"id": str(tiny_llama)}, "budget": {"steps": 4}, "output": {"root": str(tmp_path / "out")}}
    return {"name": "cmp", "trial": trial, "methods": ["lora", "dora"], "seeds": [0, 1]}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["compare", *arguments])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["methods=[lora, qdra]"], "methods.1.recipe: Input should be 'full', 'lora', 'qlora'"),
        (["seeds=[0, 0]"], "seeds: 0 stands there twice"),
        (["trial.quantization=nf4"], "trial.quantization: it belongs to a method"),
        (["tune=1"], "tune=1: one learning rate is no choice"),
        (["metod=accuracy"], "metod: unknown key; did you mean 'methods'?"),
        (["trial.eval.patience=2"], "every method gets the whole budget"),
        (["metric=nowhere:f1"], "'nowhere:f1' can't be imported"),
        (["trial.output.root=s3://bucket/x"], "a comparison needs a folder that all its nodes share"),
        (["--resume"], "--resume: no comparison 'cmp'"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    overrides: list[str], told: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(settings))
    code, out, err = run(capsys, str(tmp_path / "compare.yaml"), *overrides)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert told in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_finished_comparison_prints_its_tables(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out" / "comparisons" / "cmp"
    (folder / "studies" / "cmp").mkdir(parents=True)
    (folder / "studies" / "cmp" / "journal.jsonl").write_text('{"event": "report"}\n')
    (folder / "compare.yaml").write_text(yaml.safe_dump(dump(resolve_paths(parse(CompareConfig, settings)))))
    lora, dora = (
        MethodResult(
            name=name,
            seeds=(0, 1),
            learning_rate=1e-3,
            num_trials=2,
            adapter=f"cmp-{name}@1",
            accuracy=Estimate(value=value, low=0.5, high=1.0),
        )
        for name, value in (("lora", 0.8), ("dora", 0.7))
    )
    result = CompareResult(
        status="done", name="cmp", folder=str(folder), measure="accuracy", num_rows=40, methods=(lora, dora),
        verdict=("It is a tie.",), notes=("dora: its best learning rate is the lowest tried",), registry=str(tmp_path),
    )  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result.to_dict()))
    code, out, _ = run(capsys, str(folder / "compare.yaml"), "--resume")
    lines = out.splitlines()
    assert code == 0
    assert lines[1].split("  ")[0] == "method"
    assert lines[2].startswith("lora    0.001  80.0 % [50.0, 100.0]")
    assert "It is a tie." in lines
    assert f"next     rankloom adapters promote cmp-lora@1 --registry {tmp_path}" in lines
    assert out.index("tables   ") > out.index("dora: its best learning rate is the lowest tried")
    code, out, _ = run(capsys, str(folder / "compare.yaml"), "--resume", "--json")
    assert (code, CompareResult.model_validate_json(out)) == (0, result)
    code, _, err = run(capsys, str(folder / "compare.yaml"), "--resume", "--promote")
    assert code == 1
    assert "cmp-lora" in err
