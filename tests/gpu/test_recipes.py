"""Every recipe end to end on a GPU: trained, published, verified, and served with the tokens it was scored on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from answers import RECIPES, served, trial_of
from rankloom.data import load_data
from rankloom.models import load_tokenizer
from rankloom.registry import Registry
from rankloom.training.run import run_trial
from rankloom.training.session import LocalSession

QUANTIZED: dict[str, dict[str, Any]] = {"int8-dora": {"method": {"type": "dora"}, "quantization": "int8"}}
ON_CUDA: dict[str, dict[str, Any]] = {
    "galore8bit": {"method": {"type": "galore", "rank": 32, "extract_rank": 64, "optimizer": "adamw8bit"}},
}


@pytest.mark.parametrize("name", [*RECIPES, *QUANTIZED, *ON_CUDA])
def test_every_recipe_is_served_as_it_was_scored(
    name: str, device: torch.device, tiny_llama: Path, tmp_path: Path
) -> None:
    if name in ON_CUDA and device.type == "cpu":
        pytest.skip("bitsandbytes computes it on CUDA alone")
    recipe = (RECIPES | QUANTIZED | ON_CUDA)[name]
    trial = trial_of(tiny_llama, tmp_path, recipe)
    result = run_trial(trial, LocalSession(tmp_path / "run", device=device))
    Registry(tmp_path / "registry").verify("low@1")
    card = result["scorecard"]
    assert card.result.exact_match is not None
    assert card.result.exact_match.value == 1
    data = load_data(trial.data, load_tokenizer(trial.model))
    expected = [row.input_ids[row.prompt_length :] for row in data.test]
    assert served(trial, tmp_path / "registry", data, device) == expected
