"""A comparison's settings: recipes, learning rates to try, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from rankloom.config import CompareConfig, TrialConfig, parse
from rankloom.config.compare import TEN, MethodChoice
from rankloom.config.recipes import RECIPES, RecipeName
from rankloom.errors import ConfigError, IncompatibleError


def compare(**settings: Any) -> CompareConfig:
    return parse(CompareConfig, {"name": "cmp"} | settings)


def test_every_recipe_is_a_trial() -> None:
    assert set(get_args(RecipeName)) == set(RECIPES) >= set(TEN)
    trials = {name: parse(TrialConfig, {"name": "t", **RECIPES[name]}) for name in RECIPES}
    assert trials["qdora"].quantization.type == "nf4"
    assert trials["qlora-lora-plus"].optim.loraplus_ratio == 16
    assert trials["rslora"].method.rslora
    assert trials["pissa"].method.init == "pissa"
    assert [method.label for method in compare().methods] == list(TEN)


def test_methods_differ_in_nothing_but_their_recipe() -> None:
    comparison = compare(
        trial={"model": "org/model", "optim": {"batch_size": 4}, "budget": {"steps": 40}},
        methods=["lora", {"recipe": "qlora", "name": "q-r4", "method": {"rank": 4}, "optim": {"learning_rate": 2e-3}}],
    )
    lora, small = comparison.methods
    first, second = comparison.resolve(lora, 3, 1e-3), comparison.resolve(small, 3, small.learning_rate)
    assert (second.method.rank, second.quantization.type, second.optim.learning_rate) == (4, "nf4", 2e-3)
    assert (first.data, first.budget, first.optim.batch_size, first.seed) == (
        second.data, second.budget, second.optim.batch_size, second.seed,
    )  # fmt: skip


def test_learning_rates_are_half_a_decade_apart() -> None:
    assert compare(tune=3).list_rates(MethodChoice(recipe="lora")) == [0.000316, 0.001, 0.00316]
    assert compare(tune=2).list_rates(MethodChoice(recipe="full")) == [2.81e-05, 8.89e-05]
    assert compare().list_rates(MethodChoice(recipe="lora")) == [0.001]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"tune": 1}, "tune=1: one learning rate is no choice"),
        (
            {"tune": 3, "methods": ["lora", {"recipe": "dora", "optim": {"learning_rate": 0.5}}]},
            "optim.learning_rate: .*1.58",
        ),
        ({"seeds": [0, 0]}, "seeds: 0 stands there twice"),
        ({"seeds": []}, "seeds"),
        ({"methods": ["lora"]}, "methods"),
        ({"methods": ["lora", "lora"]}, "methods: 'lora' stands there twice; give one of them another name"),
        ({"methods": ["lora", "lora+"]}, r"recipe: .*'lora-plus'.*given 'lora\+'"),
        ({"methods": ["lora", {"recipe": "lora", "name": "A b"}]}, "methods.1.name"),
        ({"methods": ["lora", {"recipe": "dora", "method": {"rnk": 3}}]}, r"methods\[1\] \(dora\): .*'rank'"),
        ({"methods": ["lora", {"recipe": "dora", "optim": {"batch_size": 3}}]}, "trial.optim.batch_size for all"),
        ({"methods": ["lora", {"recipe": "dora", "method": {"rank": {"choice": [3]}}}]}, "rankloom tune searches"),
        ({"trial": {"quantization": "nf4"}}, "trial.quantization: it belongs to a method"),
        ({"trial": {"method": {"type": "lora"}}}, "trial.method: list the methods in methods"),
        ({"trial": {"seed": 3}}, "trial.seed: set seeds"),
        ({"trial": {"name": "x"}}, "trial.name"),
        ({"trial": {"eval": {"metric": "loss"}}}, "trial.eval.metric: set metric"),
        ({"trial": {"eval": {"patience": 2}}}, "trial.eval.patience: every method gets the whole budget"),
        ({"trial": {"optim": {"learning_rate": 1e-3}}}, "trial.optim.learning_rate: each method has its own"),
        ({"trial": {"budgt": {}}}, "'budget'"),
        ({"trial": {"budget": {"steps": 5}}}, "5 steps leave AdaLoRA 4 between"),
        ({"metric": "loss", "mode": "max"}, "mode: loss is best at its min"),
    ],
)
def test_what_can_not_be_compared_is_refused(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        compare(**settings)


def test_what_excludes_each_other_is_refused_with_its_place() -> None:
    with pytest.raises(IncompatibleError, match=r"methods\[1\] \(full\): .*quantization=nf4 is refused"):
        compare(methods=["lora", {"recipe": "full", "quantization": "nf4"}])
