"""Samplers: the search algorithms. `tune_searcher.py` asks them for points and tells them the trials' results.

Another of Ray Tune's searchers is a row of `TUNE_SEARCHERS`; one of our own is a class and a row of `SAMPLERS`.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rankloom.config.space import Point, walk_grid
from rankloom.config.study import StudyConfig
from rankloom.errors import ConfigError
from rankloom.search import flat_space

FINISHED: Literal["FINISHED"] = "FINISHED"
"""Ray Tune's word for a searcher without further points."""
Values = list[float]
"""A trial's `search.metric`, then its `search.objectives`."""


@dataclass(frozen=True)
class PriorTrial:
    """A point to begin the search with."""

    point: Point
    values: Values | None
    """An earlier trial's result there; None: the point is a good guess, to be tried first."""


class Sampler(Protocol):
    """A search algorithm. It is pickled with the study's state."""

    def ask(self, number: int) -> Point | Literal["FINISHED"] | None:
        """Return the next point, for trial `number`; FINISHED if none is left; None to wait until a trial ends."""

    def tell(self, number: int, values: Values | None) -> None:
        """Take the result of trial `number`. A failure has the worst values so far, or None before any."""


class RandomSampler:
    """Draws all branches with equal probability, and each knob from its own distribution."""

    def __init__(self, study: StudyConfig, priors: Sequence[PriorTrial]) -> None:
        self._study = study
        self._rng = random.Random(study.search.seed)
        self._first = [prior.point for prior in priors]

    def ask(self, number: int) -> Point:
        return self._first.pop(0) if self._first else flat_space.sample(self._study, self._rng)

    def tell(self, number: int, values: Values | None) -> None:
        """Random search learns nothing."""


class GridSampler:
    """Walks through every combination, branch by branch; a guess is among them."""

    _points: Iterator[Point] | None = None

    def __init__(self, study: StudyConfig, priors: Sequence[PriorTrial]) -> None:
        self._study = study
        self._next = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_points": None}  # a generator can't be pickled; `_next` says where to continue

    def ask(self, number: int) -> Point | Literal["FINISHED"]:
        self._points = self._points or itertools.islice(self._walk(), self._next, None)
        self._next += 1
        return next(self._points, FINISHED)

    def _walk(self) -> Iterator[Point]:
        for branch, knobs in enumerate(self._study.knobs):
            yield from ({flat_space.BRANCH: branch, **values} for values in walk_grid(knobs))

    def tell(self, number: int, values: Values | None) -> None:
        """A grid learns nothing."""


class OptunaSampler:
    """Optuna with one or several objectives; only the chosen branch's knobs are sampled.

    It calls Optuna directly: Ray Tune's OptunaSearch does not take earlier results where a space has conditions.
    """

    def __init__(self, study: StudyConfig, priors: Sequence[PriorTrial], sampler: Any = None) -> None:
        """`sampler`: one of Optuna's; None: TPE."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = study
        self._optuna = optuna.create_study(
            directions=[f"{study.search.best}imize", *("minimize" for _ in study.search.objectives)],
            sampler=sampler or optuna.samplers.TPESampler(seed=study.search.seed),
        )
        self._asked: dict[int, Any] = {}
        for prior in sorted(priors, key=lambda prior: prior.values is None):
            self._optuna.enqueue_trial(flat_space.to_params(study, prior.point))
            if prior.values is not None:
                self._optuna.tell(self._make_trial(), prior.values)

    def ask(self, number: int) -> Point:
        # a number is asked again after a refusal, and must get another answer
        self._asked[number] = self._make_trial()
        return flat_space.to_point(self._study, self._asked[number].params)

    def tell(self, number: int, values: Values | None) -> None:
        import optuna

        state = optuna.trial.TrialState.FAIL if values is None else None
        self._optuna.tell(self._asked.pop(number), values, state=state)

    def _make_trial(self) -> Any:
        trial = self._optuna.ask()
        flat_space.suggest(self._study, trial)
        return trial


@dataclass(frozen=True)
class TuneSearcherSpec:
    """What differs between Ray Tune's searchers."""

    module: str
    """The Python module it needs."""
    package: str
    """The package to install with pip."""
    settings: Callable[[StudyConfig], dict[str, Any]]
    """Returns the searcher's own arguments."""


def _configure_nevergrad(study: StudyConfig) -> dict[str, Any]:
    import nevergrad

    return {"optimizer": nevergrad.optimizers.OnePlusOne, "optimizer_kwargs": {"budget": study.num_trials}}


TUNE_SEARCHERS = {
    "hyperopt": TuneSearcherSpec("hyperopt", "hyperopt", lambda study: {"random_state_seed": study.search.seed}),
    "nevergrad": TuneSearcherSpec("nevergrad", "nevergrad", _configure_nevergrad),
    "bayesopt": TuneSearcherSpec(
        "bayes_opt", "bayesian-optimization<2", lambda study: {"random_state": study.search.seed}
    ),
}
"""Ray Tune's own searchers by their names in its table."""


class TuneSampler:
    """One of Ray Tune's searchers, by its name in Ray's table, over the flat space of all branches."""

    def __init__(self, study: StudyConfig, priors: Sequence[PriorTrial]) -> None:
        from ray.tune.search import create_searcher

        name = study.search.algorithm
        row = TUNE_SEARCHERS[name]
        _check_installed(name, row.module, row.package)
        # Ray's searchers suggest their initial points in order
        priors = sorted(priors, key=lambda prior: prior.values is None)
        first = [flat_space.to_params(study, prior.point, all_branches=True) for prior in priors]
        try:
            searcher = create_searcher(
                name, metric="value", mode=study.search.best, points_to_evaluate=first or None,
                **row.settings(study),
            )  # fmt: skip
            self._begin(study, searcher)
            self._search.set_search_properties("value", study.search.best, flat_space.to_flat_domains(study))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"search.algorithm={name} can't search this space: {error}; use optuna") from None
        except AttributeError as error:
            raise ConfigError(
                f"search.algorithm={name}: Ray Tune does not work with the installed version ({error}); "
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
        return params if params in (None, FINISHED) else flat_space.to_point(self._study, params)

    def _suggest(self, number: int) -> Any:
        self._asked[number] = str(self._num_asked)
        self._num_asked += 1
        with _seed_numpy(self._study.search.seed + self._num_asked):
            return self._search.suggest(self._asked[number])

    def report(self, number: int, result: dict[str, Any]) -> None:
        """Pass on a report of trial `number`, which continues."""
        value = result[self._study.search.key]
        if number in self._asked and value is not None:
            self._search.on_trial_result(self._asked[number], result | {"value": float(value)})

    def tell(self, number: int, values: Values | None) -> None:
        result = None if values is None else {"value": values[0]}
        self._search.on_trial_complete(self._asked.pop(number), result, error=values is None)


@contextmanager
def _seed_numpy(seed: int) -> Iterator[None]:
    """Seed numpy's global state for the block: some searchers draw from it and take no seed."""
    import numpy

    before = numpy.random.get_state()
    numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        numpy.random.set_state(before)


def _check_installed(name: str, module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"search.algorithm={name} needs another package: pip install '{package}'; or use random")


SAMPLERS: dict[str, Callable[[StudyConfig, Sequence[PriorTrial]], Sampler]] = {
    "random": RandomSampler,
    "grid": GridSampler,
    "optuna": OptunaSampler,
    **dict.fromkeys(TUNE_SEARCHERS, TuneSampler),
}
