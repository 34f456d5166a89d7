"""On a CUDA device: every recipe trains in bf16, 8-bit GaLore included, and leaves a verified record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rankloom.config import TrialConfig, parse
from rankloom.events import Evaluated, Event
from rankloom.registry import Registry
from rankloom.training.run import run_trial
from rankloom.training.session import LocalSession

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RECIPES: list[dict[str, Any]] = [
    {"method": {"type": "full"}},
    {"method": {"type": "lora"}},
    {"method": {"type": "lora"}, "quantization": "nf4"},
    {"method": {"type": "lora"}, "quantization": "int8"},
    {"method": {"type": "dora"}},
    {"method": {"type": "dora"}, "quantization": "nf4"},
    {"method": {"type": "dora"}, "quantization": "int8"},
    {"method": {"type": "adalora", "interval": 1}},
    {"method": {"type": "galore", "rank": 8}},
    {"method": {"type": "galore", "rank": 8, "optimizer": "adamw8bit"}},
    {"method": {"type": "lisa", "num_layers": 1}},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: "-".join(map(str, [*r["method"].values(), *list(r)[1:]])))
def test_every_recipe_trains_on_cuda(recipe: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    trial = parse(
        TrialConfig,
        {
            "name": "gpu",
            "model": {"id": str(tiny_llama)},
            "data": {"max_train_rows": 64},
            "optim": {"learning_rate": 3e-3, "batch_size": 8},
            "budget": {"steps": 12},
            "eval": {"every": 6, "max_test_rows": 28},
            "output": {"root": str(tmp_path)},
            **recipe,
        },
    )
    events: list[Event] = []
    session = LocalSession(tmp_path / "run", device=torch.device("cuda", 0), on_event=events.append)
    run_trial(trial, session)
    Registry(tmp_path / "registry").verify("gpu@1")
    losses = [event.loss for event in events if isinstance(event, Evaluated)]
    assert losses[-1] < losses[0]
