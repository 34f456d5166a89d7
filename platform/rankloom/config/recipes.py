"""Recipes: the methods by the names that people know them by, each with its recommended learning rate.

QLoRA, LoRA+ and the like are a method with other settings (see `method.py`); a recipe is one such combination. The
learning rates are those of `configs/trials`: they suit small models and rank 16, and `tune` finds better ones.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from rankloom.config.space import Tree, merge

RecipeName = Literal[
    "full", "lora", "qlora", "dora", "qdora", "lora-plus", "qlora-lora-plus", "adalora", "galore", "lisa",
    "rslora", "pissa",
]  # fmt: skip
NF4: Tree = {"quantization": "nf4"}
LORA: Tree = {"method": {"type": "lora"}, "optim": {"learning_rate": 1e-3}}
DORA: Tree = {"method": {"type": "dora"}, "optim": {"learning_rate": 1e-3}}
LORA_PLUS: Tree = {"method": {"type": "lora"}, "optim": {"learning_rate": 3e-4, "loraplus_ratio": 16}}

RECIPES: dict[str, Tree] = {
    "full": {"method": {"type": "full"}, "optim": {"learning_rate": 5e-5}},
    "lora": LORA,
    "qlora": LORA | NF4,
    "dora": DORA,
    "qdora": DORA | NF4,
    "lora-plus": LORA_PLUS,
    "qlora-lora-plus": LORA_PLUS | NF4,
    "adalora": {"method": {"type": "adalora"}, "optim": {"learning_rate": 5e-3}},
    "galore": {"method": {"type": "galore", "rank": 64}, "optim": {"learning_rate": 1e-3}},
    "lisa": {"method": {"type": "lisa", "num_layers": 4, "interval": 10}, "optim": {"learning_rate": 2e-4}},
    # alpha / sqrt(rank) is four times alpha / rank at rank 16, and the update grows with it
    "rslora": {"method": {"type": "lora", "rslora": True}, "optim": {"learning_rate": 3e-4}},
    # its A and B begin as the largest part of W instead of near zero
    "pissa": {"method": {"type": "lora", "init": "pissa"}, "optim": {"learning_rate": 2e-4}},
}
assert set(RECIPES) == set(get_args(RecipeName))


def copy_recipe(recipe: str) -> dict[str, Any]:
    """Return a copy of a recipe's settings."""
    return merge({}, {key: dict(value) if isinstance(value, dict) else value for key, value in RECIPES[recipe].items()})
