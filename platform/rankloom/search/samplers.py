"""Samplers: the search algorithms. `tune_searcher.py` asks for points and tells how the trials at these ended.

A further searcher of Ray Tune's is a row of `TUNE_SEARCHERS`; one of our own is a class here and a row of `SAMPLERS`.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rankloom.config.space import Point, grid
from rankloom.config.study import StudyConfig
from rankloom.errors import ConfigError
from rankloom.search import flat_space

FINISHED: Literal["FINISHED"] = "FINISHED"
"""As Ray Tune's searchers say it."""
Values = list[float]
"""A trial's `search.metric`, then its `search.objectives`."""


@dataclass(frozen=True)
class PriorTrial:
    """A point to begin the search with."""

    point: Point
    values: Values | None
    """An earlier trial's result there; None: it is a good guess, to be tried first."""


class Sampler(Protocol):
    """A search algorithm. It is pickled with the study's state."""

    def ask(self, number: int) -> Point | Literal["FINISHED"] | None:
        """The next point, for trial `number`; FINISHED: there is none left; None: not before some trial has ended."""

    def tell(self, number: int, values: Values | None) -> None:
        """How trial `number` ended; a failure is as bad as the worst so far, None where there is none."""


class RandomSampler:
    """Every branch as likely as another, every knob by its own distribution."""

    def __init__(self, study: StudyConfig, priors: Sequence[PriorTrial]) -> None:
        self._study = study
        self._rng = random.Random(study.search.seed)
        self._first = [prior.point for prior in priors]

    def ask(self, number: int) -> Point:
        return self._first.pop(0) if self._first else flat_space.sample(self._study, self._rng)

    def tell(self, number: int, values: Values | None) -> None:
        """Random search learns nothing."""


class GridSampler:
    """Every combination, branch by branch; a guess is among them."""

    def __init__(self, study: StudyConfig, priors: Sequence[PriorTrial]) -> None:
        self._study = study
        self._next = 0

    def ask(self, number: int) -> Point | Literal["FINISHED"]:
        points = (
            {flat_space.BRANCH: branch, **values}
            for branch, knobs in enumerate(self._study.knobs)
            for values in grid(knobs)
        )
        self._next += 1
        return next(itertools.islice(points, self._next - 1, None), FINISHED)

    def tell(self, number: int, values: Values | None) -> None:
        """A grid learns nothing."""


class OptunaSampler:
    """Optuna, of one objective or several; a branch's knobs are asked for where that branch was chosen.

    Optuna is asked by itself: Ray Tune's OptunaSearch takes no earlier results where a space has conditions.
    """

    def __init__(self, study: StudyConfig, priors: Sequence[PriorTrial], sampler: Any = None) -> None:
        """`sampler`: one of Optuna's; None: TPE."""
        _check_installed("optuna", "optuna", "rankloom[search]")
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = study
        self._optuna = optuna.create_study(
            directions=[f"{study.search.best}imize", *("minimize" for _ in study.search.objectives)],
            sampler=sampler or optuna.samplers.TPESampler(seed=study.search.seed),
        )
        self._asked: dict[int, Any] = {}
        for prior in sorted(priors, key=lambda prior: prior.values is None):
            self._optuna.enqueue_trial(flat_space.params_of(study, prior.point))
            if prior.values is not None:
                self._optuna.tell(self._new_trial(), prior.values)

    def ask(self, number: int) -> Point:
        # the same number is asked for again after a refusal, and must not get the same answer
        self._asked[number] = self._new_trial()
        return flat_space.point_of(self._study, self._asked[number].params)

    def tell(self, number: int, values: Values | None) -> None:
        import optuna

        state = optuna.trial.TrialState.FAIL if values is None else None
        self._optuna.tell(self._asked.pop(number), values, state=state)

    def _new_trial(self) -> Any:
        trial = self._optuna.ask()
        flat_space.suggest(self._study, trial)
        return trial


@dataclass(frozen=True)
class TuneSearcherSpec:
    """What Ray Tune's searchers do not say alike."""

    module: str
    """The Python module that it needs."""
    package: str
    """What pip installs it by."""
    settings: Callable[[StudyConfig], dict[str, Any]]
    """Its own arguments."""


def _nevergrad(study: StudyConfig) -> dict[str, Any]:
    import nevergrad

    return {"optimizer": nevergrad.optimizers.OnePlusOne, "optimizer_kwargs": {"budget": study.num_trials}}


TUNE_SEARCHERS = {
    "hyperopt": TuneSearcherSpec("hyperopt", "hyperopt", lambda study: {"random_state_seed": study.search.seed}),
    "nevergrad": TuneSearcherSpec("nevergrad", "nevergrad", _nevergrad),
    "bayesopt": TuneSearcherSpec(
        "bayes_opt", "bayesian-optimization<2", lambda study: {"random_state": study.search.seed}
    ),
}
"""Ray Tune's own searchers by their names in its table."""


class TuneSampler:
    """Any of Ray Tune's own searchers, by its name in Ray's table, over the flat space of all branches."""

    def __init__(self, study: StudyConfig, priors: Sequence[PriorTrial]) -> None:
        from ray.tune.search import create_searcher

        name = study.search.algorithm
        row = TUNE_SEARCHERS[name]
        _check_installed(name, row.module, row.package)
        # Ray's searchers give the points that they are to begin with in their order
        priors = sorted(priors, key=lambda prior: prior.values is None)
        first = [flat_space.params_of(study, prior.point, all_branches=True) for prior in priors]
        try:
            searcher = create_searcher(
                name, metric="value", mode=study.search.best, points_to_evaluate=first or None,
                **row.settings(study),
            )  # fmt: skip
            self._begin(study, searcher)
            self._search.set_search_properties("value", study.search.best, flat_space.flat(study))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"search.algorithm={name} can't search this space: {error}; use optuna") from None
        except AttributeError as error:
            raise ConfigError(
                f"search.algorithm={name}: Ray Tune can't work with the version that is installed ({error}); "
                f"pip install '{row.package}'"
            ) from None
        for number, prior in enumerate(priors):
            if prior.values is not None:
                self.ask(-1 - number)
                self.tell(-1 - number, prior.values)

    def _begin(self, study: StudyConfig, searcher: Any) -> None:
        self._study, self._search = study, searcher
        self._num_asked = 0
        self._asked: dict[int, str] = {}

    def ask(self, number: int) -> Point | Literal["FINISHED"] | None:
        params = self._suggest(number)
        return params if params in (None, FINISHED) else flat_space.point_of(self._study, params)

    def _suggest(self, number: int) -> Any:
        self._asked[number] = str(self._num_asked)
        self._num_asked += 1
        with _numpy_seeded(self._study.search.seed + self._num_asked):
            return self._search.suggest(self._asked[number])

    def tell(self, number: int, values: Values | None) -> None:
        result = None if values is None else {"value": values[0]}
        self._search.on_trial_complete(self._asked.pop(number), result, error=values is None)


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Some searchers take no seed, and draw by numpy's global state."""
    import numpy

    before = numpy.random.get_state()
    numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        numpy.random.set_state(before)


def _check_installed(name: str, module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"search.algorithm={name} needs a package more: pip install '{package}'; or use random")


SAMPLERS: dict[str, Callable[[StudyConfig, Sequence[PriorTrial]], Sampler]] = {
    "random": RandomSampler,
    "grid": GridSampler,
    "optuna": OptunaSampler,
    **dict.fromkeys(TUNE_SEARCHERS, TuneSampler),
}
