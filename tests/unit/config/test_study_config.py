"""A study's settings: knobs, branches, what is refused and how it is said."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from rankloom.config import StudyConfig, dump, parse
from rankloom.config.method import GaLoreConfig, LoraConfig
from rankloom.config.space import count_grid, find_knobs, merge, place, walk_grid
from rankloom.config.study import is_fusable, make_host_key
from rankloom.errors import ConfigError, IncompatibleError

LORA = {
    "method": {"type": "lora", "rank": {"choice": [4, 8]}, "alpha_over_rank": {"choice": [0.5, 2]}},
    "optim": {"learning_rate": {"loguniform": [1e-4, 1e-2]}},
}


def study(**changed: Any) -> StudyConfig:
    return parse(StudyConfig, {"name": "s", "space": [LORA]} | changed)


def test_a_point_becomes_a_trial() -> None:
    config = study(trial={"optim": {"batch_size": 4}, "budget": {"steps": 10}}, search={"metric": "accuracy"})
    point = {"branch": 0, "method.rank": 8, "method.alpha_over_rank": 2, "optim.learning_rate": 2e-3}
    trial = config.resolve(point, number=7)
    assert trial.name == "s-0007"
    assert isinstance(trial.method, LoraConfig)
    assert (trial.method.rank, trial.method.alpha) == (8, 16.0)
    assert (trial.optim.learning_rate, trial.optim.batch_size, trial.budget.steps) == (2e-3, 4, 10)
    assert trial.eval.metric == "accuracy"


def test_alpha_over_rank_uses_the_default_rank() -> None:
    config = study(space=[{"method": {"type": "dora", "alpha_over_rank": {"choice": [2]}}}])
    assert config.resolve({"branch": 0, "method.alpha_over_rank": 2}).method.alpha == 32.0  # type: ignore[union-attr]


def test_a_section_of_another_type_replaces_the_trials() -> None:
    config = study(
        trial={"method": {"type": "lora", "rank": 4, "rslora": True}}, space=[{"method": {"type": "galore"}}]
    )
    assert config.resolve({"branch": 0}).method == GaLoreConfig()
    assert merge({"a": {"type": "x", "b": 1}, "c": 1}, {"a": {"b": 2}}) == {"a": {"type": "x", "b": 2}, "c": 1}
    assert merge({"quantization": {"type": "nf4", "double": False}}, {"quantization": "none"}) == {
        "quantization": "none"
    }


def test_the_baseline_is_the_first_warm_start() -> None:
    assert study().baseline.method == LoraConfig()
    warm = [{"method": {"type": "lora", "rank": r}} for r in (2, 3)]
    assert study(search={"warm_start": warm}).baseline.method.rank == 2  # type: ignore[union-attr]


def test_grid_counts_and_lists_every_combination() -> None:
    knobs = find_knobs({"a": {"choice": [1, 2]}, "b": {"c": {"randint": [5, 7]}}})
    assert count_grid(knobs) == len(list(walk_grid(knobs))) == 6
    assert {(p["a"], p["b.c"]) for p in walk_grid(knobs)} == {(a, c) for a in (1, 2) for c in (5, 6, 7)}
    tree = {"a": {"choice": [1]}, "b": {"c": {"randint": [5, 7]}, "d": 1}}
    assert place(tree, {"a": 1, "b.c": 6}) == {"a": 1, "b": {"c": 6, "d": 1}}
    assert study(space=[{"seed": {"choice": [1, 2, 3]}}], search={"algorithm": "grid"}).num_trials == 4


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"space": [{"method": {"type": "lora", "rnak": {"choice": [4]}}}]}, r"space\[0\].*method.rnak.*'rank'"),
        ({"space": [{"method": {"type": "lora", "rank": {"choice": [4, 0]}}}]}, r"space\[0\].*rank.*given 0"),
        ({"space": [LORA, {"optim": {"learning_rate": {"uniform": [1, 2]}}}]}, r"space\[1\].*learning_rate.*given 2"),
        ({"space": [{"optim": {"learning_rate": {"loguniform": [0, 1]}}}]}, r"loguniform.*greater than 0"),
        ({"space": [{"optim": {"learning_rate": {"uniform": [0.2, 0.1]}}}]}, r"uniform.*low < high"),
        ({"space": [{"method": {"type": "lora", "rank": {"uniform": [2, 8]}}}]}, r"rank\.uniform.*whole.*randint"),
        ({"space": [{"optim": {"batch_size": {"loguniform": [1, 8.5]}}}]}, r"batch_size\.loguniform.*whole.*\[1, 8\]"),
        ({"space": [{"data": {"max_length": {"uniform": [64.5, 99]}}}]}, r"max_length\.uniform.*randint or choice"),
        ({"space": [{"budget": {"steps": {"uniform": [2, 8]}}}]}, r"steps\.uniform.*randint or choice"),
        ({"space": [{"seed": {"randint": [1, 2], "choice": [1]}}]}, r"seed: expected randint alone"),
        ({"space": [{"seed": {"choice": []}}]}, r"seed.choice: .*at least 1"),
        ({"space": [{"method": {"type": "lora", "rank": {"choices": [2, 4]}}}]}, r"rank: unknown 'choices'.*'choice'"),
        ({"space": [{"seed": {"rand_int": [2, 4]}}]}, r"seed: unknown 'rand_int'; did you mean 'randint'"),
        ({"space": []}, "space"),
        ({"trial": {"optim": {"learning_rat": 1}}}, r"trial.*optim.learning_rat.*'learning_rate'"),
        ({"trial": {"name": "x"}}, r"trial.name.*remove it"),
        ({"trial": {"eval": {"metric": "accuracy"}}}, r"eval.metric=accuracy is not search.metric=loss"),
        ({"search": {"mode": "max"}}, r"mode: loss is best at its min"),
        ({"search": {"algorithm": "grid"}}, r"space\[0\].*optim.learning_rate.*grid search needs choice"),
        ({"search": {"algorithm": "tpe"}}, r"search.algorithm"),
        ({"search": {"warm_start": [{"method": {"type": "lora", "rank": -1}}]}}, r"warm_start\[0\].*method.rank"),
        ({"scheduler": {"type": "sha"}}, r"scheduler.type: unknown type 'sha'"),
        ({"scheduler": {"type": "pbt"}, "space": [LORA, LORA]}, "one branch"),
        ({"space": [{"method": {"type": "lora", "alpha": 1, "alpha_over_rank": 2}}]}, "exclude each other"),
        ({"space": [{"method": {"type": "galore", "alpha_over_rank": 2}}]}, "galore does not have both alpha and rank"),
        ({"search": {"objectives": ["memory"]}}, r"search.objectives.*memory_bytes.*given 'memory'"),
        ({"search": {"objectives": ["latency_ms", "latency_ms"]}}, r"search: objectives: each only once"),
        ({"search": {"algorithm": "grid", "priors": ["x"]}}, r"priors: algorithm=grid learns nothing"),
        ({"hosts": {"slots": 4}}, r"hosts.slots.*num_slots"),
    ],
)  # fmt: skip
def test_a_wrong_study_is_refused(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){told}"):
        study(**changed)


def test_a_branch_where_nothing_is_possible_is_refused_one_with_something_is_not() -> None:
    galore = {"method": {"type": "galore"}, "quantization": {"choice": ["nf4", "int8"]}}
    with pytest.raises(IncompatibleError, match=r"space\[0\]: none of its trials is possible.*galore"):
        study(space=[galore])
    assert study(space=[galore | {"quantization": {"choice": ["nf4", "none"]}}]).space


def test_what_shares_a_host() -> None:
    config = study(
        space=[
            {"method": {"type": "lora", "rank": 4}, "quantization": {"choice": ["none", "nf4", "int8"]}},
            {"method": {"type": "dora"}, "optim": {"batch_size": {"choice": [1, 2]}}},
            {"method": {"type": "lora", "init": "pissa"}},
            {"method": {"type": "lisa"}},
            {"method": {"experts": True}},
        ]
    )
    members = list(config.probe_trials())
    assert len({make_host_key(trial) for trial in members}) == 3
    assert {trial.method.type for trial in members if is_fusable(trial)} == {"lora", "dora"}
    assert not is_fusable(config.resolve({"branch": 2}))
    assert not is_fusable(config.resolve({"branch": 4}))
    for compute in ({"precision": "fp16"}, {"activation_checkpointing": True}):
        alone = parse(StudyConfig, {"name": "s", "trial": {"compute": compute}, "space": [{"seed": {"choice": [1]}}]})
        assert not is_fusable(alone.baseline)  # what a host would have to leave out is run by itself


def test_what_is_computed_once_changes_neither_equality_nor_copies() -> None:
    grid = {"algorithm": "grid"}
    space = [{"method": {"type": "lora", "rank": {"choice": [4, 8]}}}]
    fresh, used = (study(space=space, search=grid) for _ in range(2))
    assert used.num_trials == 3
    assert used.baseline is used.baseline
    assert used == fresh
    again = pickle.loads(pickle.dumps(used))
    assert again == fresh
    assert again.baseline == used.baseline
    wider = used.model_copy(update={"space": [{"method": {"type": "lora", "rank": {"choice": [4, 8, 16]}}}]})
    assert wider.num_trials == 4
    assert used.num_trials == 3
    assert dump(used) == dump(fresh)
