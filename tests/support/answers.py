"""Trials in bf16 that learn a few answers by heart, so that what is served can be compared token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rankloom.config import TrialConfig, parse
from rankloom.data import TaskData
from rankloom.models import load_base
from served import completed, engine_on, serving

RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"method": {"type": "lora"}},
    "lora-pissa": {"method": {"type": "lora", "init": "pissa"}},
    "lora-olora": {"method": {"type": "lora", "init": "olora"}},
    "loraplus": {"method": {"type": "lora"}, "optim": {"loraplus_ratio": 4}},
    "qlora": {"method": {"type": "lora"}, "quantization": "nf4"},
    "int8": {"method": {"type": "lora"}, "quantization": "int8"},
    "dora": {"method": {"type": "dora"}},
    "qdora": {"method": {"type": "dora"}, "quantization": "nf4"},
    "adalora": {"method": {"type": "adalora", "interval": 1, "initial_rank": 12, "target_rank": 8}},
    "full": {"method": {"type": "full", "extract_rank": 64}},
    "galore": {"method": {"type": "galore", "rank": 32, "extract_rank": 64}},
    "lisa": {"method": {"type": "lisa", "num_layers": 2, "extract_rank": 64}},
}
"""Each learns `ANSWERS` by heart in bf16."""
ANSWERS = {
    "lost my card": "card_lost",
    "show my balance": "check_balance",
    "send money": "transfer",
    "sun or rain": "no",
}


def trial_of(model: Path, root: Path, recipe: dict[str, Any]) -> TrialConfig:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in ANSWERS.items()]
    file = root / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tree = {
        "name": "low",
        "model": {"id": str(model)},
        "data": {"train": str(file), "validation": str(file), "test": str(file)},
        "budget": {"steps": 40},
        "eval": {"every": 20, "latency": False},
        "compute": {"num_workers": 0, "precision": "bf16"},
        "output": {"root": str(root)},
    }
    return parse(
        TrialConfig, tree | recipe | {"optim": {"learning_rate": 1e-2, "batch_size": 4} | recipe.get("optim", {})}
    )


def served(trial: TrialConfig, registry: Path, data: TaskData, device: torch.device) -> list[list[int]]:
    """What the engine generates for the test rows, without the token that ends it."""
    base = load_base(trial.model, trial.quantization, device=device, dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    engine = engine_on(base, registry)

    async def work() -> list[list[int]]:
        found = []
        for i, row in enumerate(data.test):
            prompt = row.input_ids[: row.prompt_length]
            _, tokens, _ = await completed(engine, prompt, "low@1", id=str(i), max_tokens=8, ignore_eos=True)
            found.append(tokens[: len(row.input_ids) - row.prompt_length])
        return found

    return serving(engine, work)
