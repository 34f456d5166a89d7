"""The whole way of a trial in one process: what is trained is exported, read back, scored and published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from rankloom.config import COMPATIBLE, TrialConfig, parse
from rankloom.errors import ConfigError, DataError, ModelError, RegistryError, TrialError
from rankloom.evals.own_metric import Prediction
from rankloom.events import Evaluated, Event
from rankloom.registry import Registry
from rankloom.training.run import evaluate, run_trial
from rankloom.training.session import LocalSession

METHODS: dict[str, dict[str, Any]] = {
    "full": {"extract_rank": 16},
    "lora": {},
    "dora": {},
    "adalora": {"interval": 1, "initial_rank": 6, "target_rank": 3},
    "galore": {"rank": 8, "extract_rank": 16},
    "lisa": {"num_layers": 1, "extract_rank": 16},
}
BASES = [(m, q) for m, row in COMPATIBLE.items() for q in sorted(row.quantization)]


def trial_of(model: Path, root: Path, method: str = "lora", **sections: Any) -> TrialConfig:
    tree: dict[str, Any] = {
        "name": "tiny",
        "model": {"id": str(model)},
        "data": {"max_train_rows": 64, "test": "builtin:bank-intents"},
        "method": {"type": method, **METHODS[method]},
        "optim": {"learning_rate": 3e-3, "batch_size": 8},
        "budget": {"steps": 12},
        "eval": {"every": 6, "max_rows": 16, "max_test_rows": 28, "latency": False},
        "compute": {"num_workers": 0},
        "output": {"root": str(root)},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
    return parse(TrialConfig, tree)


def run(trial: TrialConfig, root: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    events: list[Event] = []
    session = LocalSession(root / "runs" / trial.name, device=torch.device("cpu"), on_event=events.append)
    return run_trial(trial, session), events


@pytest.mark.parametrize(("method", "quantization"), BASES)
def test_every_method_on_every_base_leaves_a_verified_record(
    method: str, quantization: str, tiny_llama: Path, tmp_path: Path
) -> None:
    trial = trial_of(tiny_llama, tmp_path, method, quantization=quantization)
    result, events = run(trial, tmp_path)
    record = Registry(tmp_path / "registry").verify("tiny@1")
    assert record.method == method
    assert record.base.quantization == quantization
    assert record.servable == COMPATIBLE[method].servable
    card = result["scorecard"]
    assert card.base is not None
    assert card.result.loss < card.base.loss
    assert (card.extraction is not None) == (record.servable == "extracted")
    losses = [e.loss for e in events if isinstance(e, Evaluated)]
    assert losses[-1] < losses[0]
    if quantization == "none":
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), result["adapter"])
        assert loaded.peft_config["default"].peft_type == "LORA"


def test_extraction_at_full_rank_scores_as_the_trained_weights(tiny_llama: Path, tmp_path: Path) -> None:
    trial = trial_of(tiny_llama, tmp_path, method="full")
    trial = trial.model_copy(update={"method": trial.method.model_copy(update={"extract_rank": 64})})
    card = run(trial, tmp_path)[0]["scorecard"]
    assert card.extraction is not None
    assert card.extraction.energy == pytest.approx(1, abs=1e-5)
    assert card.result.loss == pytest.approx(card.extraction.trained.loss, rel=1e-4)


def test_a_tuned_model_can_be_kept_whole(tiny_llama: Path, tmp_path: Path) -> None:
    trial = trial_of(tiny_llama, tmp_path, "full", output={"root": str(tmp_path), "keep_model": True})
    result, _ = run(trial, tmp_path)
    again = trial_of(tmp_path / "runs" / "tiny" / "model", tmp_path)
    session = LocalSession(tmp_path / "again", device=torch.device("cpu"))
    scored = evaluate(again, None, session)
    assert scored["base"].loss == pytest.approx(result["scorecard"].extraction.trained.loss, rel=1e-4)


def test_retention_is_measured_beside_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "general.jsonl").write_text('{"text": "the weather is fine today"}\n{"text": "the sun shines"}\n')
    trial = trial_of(tiny_llama, tmp_path, eval={"retention": str(tmp_path / "general.jsonl")})
    card = run(trial, tmp_path)[0]["scorecard"]
    assert card.base is not None
    assert card.result.retention_loss != card.base.retention_loss
    assert card.result.retention_loss is not None


def test_generated_answers_are_compared_where_there_are_no_labels(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {word} please, number {i}", "completion": word} for i in range(20) for word in ("a", "b")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "test": None, "max_train_rows": None}
    trial = trial_of(tiny_llama, tmp_path, data=data, budget={"steps": 60}, eval={"every": 60, "latency": True})
    card = run(trial, tmp_path)[0]["scorecard"]
    assert card.result.exact_match is not None
    assert card.result.exact_match.low <= card.result.exact_match.value <= card.result.exact_match.high
    assert card.result.exact_match.value > 0.3
    assert card.base is not None
    assert card.base.exact_match is not None
    assert card.base.exact_match.value == 0
    assert card.result.accuracy is None
    assert card.result.latency_ms is not None
    assert card.result.latency_ms > 0


def test_evaluate_reads_the_published_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    trial = trial_of(tiny_llama, tmp_path)
    result, _ = run(trial, tmp_path)
    session = LocalSession(tmp_path / "again", device=torch.device("cpu"))
    scored = evaluate(trial, Path(result["adapter"]), session)
    assert scored["result"].loss == pytest.approx(result["scorecard"].result.loss, rel=1e-5)


def test_evaluate_refuses_another_base_and_a_changed_adapter(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    trial = trial_of(tiny_model("llama"), tmp_path)
    adapter = Path(run(trial, tmp_path)[0]["adapter"])
    session = LocalSession(tmp_path / "again", device=torch.device("cpu"))
    with pytest.raises(RegistryError, match=r"tiny@1 was tuned on .* other weights"):
        evaluate(trial_of(tiny_model("qwen"), tmp_path), adapter, session)
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    weights = bytearray((copy / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(RegistryError, match=r"adapter_model\.safetensors"):
        evaluate(trial, copy, session)


def test_rows_beyond_the_models_positions_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text("text,label\n" + "".join(f"{'word ' * 600}{i},a\n" for i in range(12)))
    data = {"train": str(tmp_path / "long.csv"), "test": None, "max_train_rows": None, "max_length": 2048}
    with pytest.raises(ConfigError, match=r"data\.max_length.*512 positions"):
        run(trial_of(tiny_llama, tmp_path, data=data), tmp_path)


def test_training_that_changes_nothing_is_not_published(tiny_llama: Path, tmp_path: Path) -> None:
    trial = trial_of(tiny_llama, tmp_path, optim={"learning_rate": 1e-30}, budget={"steps": 1})
    with pytest.raises(TrialError, match="changes nothing"):
        run(trial, tmp_path)
    assert not list((tmp_path / "registry").glob("tiny/*")) if (tmp_path / "registry").exists() else True


def test_a_missing_model_or_file_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.id.*nowhere"):
        run(trial_of(tmp_path / "nowhere", tmp_path), tmp_path)
    with pytest.raises(DataError, match="nowhere"):
        run(trial_of(tiny_llama, tmp_path, data={"train": str(tmp_path / "nowhere.csv")}), tmp_path)


def test_a_truncated_model_file_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_llama.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(ModelError, match="broken"):
        run(trial_of(broken, tmp_path), tmp_path)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_own_metric_chooses_the_best_checkpoint_and_is_on_the_scorecard(
    mode: str, tiny_llama: Path, tmp_path: Path
) -> None:
    trial = trial_of(tiny_llama, tmp_path, eval={"every": 2, "metric": "python:own", "mode": mode, "patience": 2})
    values = iter([0.5, 0.3, 0.9, 0.1, 0.2, 0.2, 0.2, 7.0, 8.0])  # before training, then every two steps

    def own(rows: list[Prediction]) -> float:
        assert {row.reference for row in rows} & {row.prediction for row in rows}
        return next(values)

    events: list[Event] = []
    session = LocalSession(tmp_path / "run", device=torch.device("cpu"), on_event=events.append)
    result = run_trial(trial, session, metric=own)
    told = [(event.metric, event.best) for event in events if isinstance(event, Evaluated)]
    best = {"max": [False, True, True, False, False], "min": [False, True, False, True, False, False]}[mode]
    assert told == list(zip([0.5, 0.3, 0.9, 0.1, 0.2, 0.2], best, strict=False))
    card = result["scorecard"]
    assert card.result.metric is not None
    assert (card.result.metric.name, card.result.metric.best) == ("python:own", mode)
    record = Registry(tmp_path / "registry").get("tiny")
    assert record.scorecard is not None
    assert record.scorecard.result.metric == card.result.metric
