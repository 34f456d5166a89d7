"""A study scores a finalist as a trial scores its own adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rankloom.config import TrialConfig, parse
from rankloom.registry import Registry
from rankloom.search.finalists import Finalist
from rankloom.search.score_finalists import score_finalists
from rankloom.training.run import run_trial
from rankloom.training.session import LocalSession


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_finalist_has_the_scorecard_of_a_trial(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    tree = {
        "name": "tiny",
        "model": {"id": str(tiny_llama)},
        "data": {"train": "builtin:bank-intents", "max_train_rows": 64, "test": "builtin:bank-intents"},
        "method": {"type": method},
        "optim": {"learning_rate": 3e-3, "batch_size": 8},
        "budget": {"steps": 12},
        "eval": {"every": 6, "max_rows": 16, "max_test_rows": 28, "latency": False},
        "compute": {"num_workers": 0},
        "output": {"root": str(tmp_path)},
    }
    trial = parse(TrialConfig, tree)
    result = run_trial(trial, LocalSession(tmp_path / "runs" / "tiny", device=torch.device("cpu")))
    own = result["scorecard"]
    folder = tmp_path / "study" / "adapters" / "tiny"
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(Path(result["adapter"]) / name, folder)
    finalist = Finalist(
        trial=trial,
        folder=str(folder),
        names=["found", "found-lora"],
        steps=own.steps,
        tokens=own.train_tokens,
        train_s=own.train_s,
        memory_bytes=own.peak_memory_bytes,
    )
    scores = score_finalists("found", [finalist, finalist], lambda _: None)
    assert [score.error for score in scores] == [None, None]
    assert [score.scorecard for score in scores] == [own, own]  # the first left the base bare
    assert [score.published for score in scores] == [["found@1", "found-lora@1"]] * 2
    records = [Registry(tmp_path / "registry").verify(ref) for ref in ("tiny@1", "found@1")]
    files = [{name: file for name, file in record.files.items() if name != "README.md"} for record in records]
    assert files[0] == files[1]
    assert [record.lineage.study for record in records] == [None, "found"]
