"""Translate a study's space into the searchers' terms and back; pure.

A searcher sees flat names, `0:optim.learning_rate` for the knob of branch 0, so that knobs of two branches stay apart.
A choice whose values are not plain scalars is searched by index.
"""

from __future__ import annotations

import math
import random
from typing import Any

from rankloom.config.space import Choice, Knob, LogUniform, Point, RandInt
from rankloom.config.study import StudyConfig

BRANCH = "branch"


def sample(study: StudyConfig, rng: random.Random) -> Point:
    """Return a random point; all branches are equally likely."""
    branch = rng.randrange(len(study.space))
    return {BRANCH: branch} | {name: draw(knob, rng) for name, knob in study.knobs[branch].items()}


def draw(knob: Knob, rng: random.Random) -> Any:
    """Return a random value of one knob."""
    if isinstance(knob, Choice):
        return rng.choice(knob.choice)
    if isinstance(knob, RandInt):
        return rng.randint(*knob.randint)
    if isinstance(knob, LogUniform):
        low, high = map(math.log, knob.loguniform)
        return min(max(math.exp(rng.uniform(low, high)), knob.loguniform[0]), knob.loguniform[1])
    return rng.uniform(*knob.uniform)


def suggest(study: StudyConfig, trial: Any) -> None:
    """Ask an Optuna trial (define-by-run) for the branch, then for that branch's knobs only."""
    branches = len(study.space)
    branch = trial.suggest_categorical(BRANCH, list(range(branches))) if branches > 1 else 0
    for name, knob in study.knobs[branch].items():
        at = f"{branch}:{name}"
        if isinstance(knob, Choice):
            trial.suggest_categorical(at, _list_options(knob))
        elif isinstance(knob, RandInt):
            trial.suggest_int(at, *knob.randint)
        else:
            trial.suggest_float(at, *knob.bounds, log=isinstance(knob, LogUniform))


def to_flat_domains(study: StudyConfig) -> dict[str, Any]:
    """Return Ray Tune's domains of all branches' knobs side by side, for searchers without conditions."""
    from ray import tune  # imported late: reports need the rest of this module, and no Ray

    branches = len(study.space)
    domains: dict[str, Any] = {BRANCH: tune.choice(list(range(branches)))} if branches > 1 else {}
    for branch, knobs in enumerate(study.knobs):
        for name, knob in knobs.items():
            if isinstance(knob, Choice):
                domain: Any = tune.choice(_list_options(knob))
            elif isinstance(knob, RandInt):
                domain = tune.randint(knob.randint[0], knob.randint[1] + 1)
            elif isinstance(knob, LogUniform):
                domain = tune.loguniform(*knob.loguniform)
            else:
                domain = tune.uniform(*knob.uniform)
            domains[f"{branch}:{name}"] = domain
    return domains


def to_point(study: StudyConfig, params: dict[str, Any]) -> Point:
    """Return the point of a searcher's flat parameters."""
    branch = int(params.get(BRANCH, 0))
    point: Point = {BRANCH: branch}
    for name, knob in study.knobs[branch].items():
        value = params[f"{branch}:{name}"]
        if isinstance(knob, Choice):
            point[name] = value if _list_options(knob) is knob.choice else knob.choice[int(value)]
        elif isinstance(knob, RandInt):
            point[name] = int(value)
        else:  # some searchers give numpy's numbers, or exceed a bound by rounding
            low, high = knob.bounds
            point[name] = min(max(float(value), low), high)
    return point


def to_params(study: StudyConfig, point: Point, *, all_branches: bool = False) -> dict[str, Any]:
    """Return the flat parameters of a point: the inverse of `to_point`.

    Args:
        all_branches: include the knobs of the other branches, each at some value.
    """
    params: dict[str, Any] = {BRANCH: point[BRANCH]} if len(study.space) > 1 else {}
    for branch, knobs in enumerate(study.knobs):
        if branch == point[BRANCH] or all_branches:
            for name, knob in knobs.items():
                value = point[name] if branch == point[BRANCH] else knob.ends()[0]
                by_index = isinstance(knob, Choice) and _list_options(knob) is not knob.choice
                params[f"{branch}:{name}"] = knob.choice.index(value) if by_index else value  # type: ignore[union-attr]
    return params


def list_mutations(study: StudyConfig) -> dict[str, Any]:
    """Return the knobs that population based training may change in a running trial, as functions that draw a value.

    A new rank, method or data set would make another trial; the optimiser's rates and dropout do not.
    """
    mutable = ("optim.learning_rate", "optim.loraplus_ratio", "optim.weight_decay", "method.dropout")
    knobs = study.knobs[0]
    return {name: _Draw(knobs[name]) for name in mutable if name in knobs}


class _Draw:
    """A knob's draw as a picklable function."""

    def __init__(self, knob: Knob) -> None:
        self._knob = knob

    def __call__(self) -> Any:
        return draw(self._knob, random.Random())


def _list_options(knob: Choice) -> list[Any]:
    """Return the choice itself if its values are all plain scalars, else their indices."""
    scalars = all(value is None or isinstance(value, (bool, int, float, str)) for value in knob.choice)
    return knob.choice if scalars else list(range(len(knob.choice)))
