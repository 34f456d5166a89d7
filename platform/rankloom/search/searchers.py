"""Searchers: who says which point is tried next.

`StudySearcher` is what Ray Tune sees whatever the algorithm. It gives the warm starts first, then asks a *proposer*;
each point is resolved to a trial, and one that can't be is refused, counted, and asked for again.
"""

from __future__ import annotations

import itertools
import logging
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ray.tune.search import Searcher

from rankloom.config.space import Point, grid
from rankloom.config.study import StudyConfig
from rankloom.errors import ConfigError, IncompatibleError
from rankloom.search import space

MAX_REFUSALS_IN_A_ROW = 200
"""After so many the space is taken to hold nothing more."""


class Proposer(Protocol):
    """A search algorithm. It is pickled with the study's state."""

    def propose(self, number: int) -> Point | None:
        """The next point, for trial `number`; None: there is none left."""

    def tell(self, number: int, value: float | None) -> None:
        """How trial `number` ended: its metric, or None where it failed or was refused."""


class RandomProposer:
    """Every branch as likely as another, every knob by its own distribution."""

    def __init__(self, study: StudyConfig) -> None:
        self._study = study
        self._rng = random.Random(study.search.seed)

    def propose(self, number: int) -> Point | None:
        return space.sample(self._study, self._rng)

    def tell(self, number: int, value: float | None) -> None:
        """Random search learns nothing."""


class GridProposer:
    """Every combination, branch by branch."""

    def __init__(self, study: StudyConfig) -> None:
        self._study = study
        self._next = 0

    def propose(self, number: int) -> Point | None:
        points = (
            {space.BRANCH: branch, **values} for branch, knobs in enumerate(self._study.knobs) for values in grid(knobs)
        )
        self._next += 1
        return next(itertools.islice(points, self._next - 1, None), None)

    def tell(self, number: int, value: float | None) -> None:
        """A grid learns nothing."""


class OptunaProposer:
    """Optuna's TPE, through Ray Tune's own searcher."""

    def __init__(self, study: StudyConfig) -> None:
        try:
            import optuna
        except ImportError:
            raise ConfigError(
                "search.algorithm=optuna needs the package optuna: pip install 'rankloom[search]', or random"
            ) from None
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = study
        self._search = OptunaSearch(_DefineByRun(study), metric="value", mode=study.search.best, seed=study.search.seed)
        self._asked: dict[int, str] = {}
        self._num_asked = 0

    def propose(self, number: int) -> Point | None:
        # the same number is asked for again after a refusal, and must not get the same answer
        self._asked[number] = str(self._num_asked)
        self._num_asked += 1
        # Ray's searcher unflattens at "/", which no name here has
        return space.point_of(self._study, self._search.suggest(self._asked[number]))

    def tell(self, number: int, value: float | None) -> None:
        result = None if value is None else {"value": value}
        self._search.on_trial_complete(self._asked.pop(number), result, error=value is None)


class _DefineByRun:
    """`space.suggest` bound to a study, picklable."""

    def __init__(self, study: StudyConfig) -> None:
        self._study = study

    def __call__(self, trial: Any) -> None:
        space.suggest(self._study, trial)


PROPOSERS: dict[str, Callable[[StudyConfig], Proposer]] = {
    "random": RandomProposer,
    "grid": GridProposer,
    "optuna": OptunaProposer,
}


def population(study: StudyConfig) -> dict[str, Any]:
    """A parameter space that holds exactly the searcher's points: population based training takes no searcher."""
    from ray import tune

    searcher = StudySearcher(study)
    points = [searcher.suggest(str(number)) for number in range(study.num_trials)]
    keys = {key for point in points for key in point} - {"number"}
    drawn = {key: tune.sample_from(_Of([point[key] for point in points])) for key in keys}
    return {"number": tune.grid_search(list(range(len(points))))} | drawn


class _Of:
    """A value by the trial's number, picklable."""

    def __init__(self, values: list[Any]) -> None:
        self._values = values

    def __call__(self, spec: Any) -> Any:
        return self._values[spec.config.number]


class StudySearcher(Searcher):  # type: ignore[misc]
    """Warm starts, then what the proposer says, each held to the trial's own rules.

    What it suggests is a point with the trial's `number` and how many points were `refused` so far; the trial is
    resolved again where it runs.
    """

    def __init__(self, study: StudyConfig) -> None:
        super().__init__(metric=study.search.metric, mode=study.search.best)
        self._study = study
        self._proposer = PROPOSERS[study.search.algorithm](study)
        self._count = 0
        self._numbers: dict[str, int] = {}
        self.refusals: list[str] = []
        """Why points were refused."""

    def suggest(self, trial_id: str) -> Any:
        if self._count >= self._study.num_trials:
            return Searcher.FINISHED
        number = self._count
        point = self._next(number)
        if point is None:
            return Searcher.FINISHED
        self._count += 1
        self._numbers[trial_id] = number
        return {"number": number, "refused": len(self.refusals), **point}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers.pop(trial_id, None)
        if number is None or number < self._study.num_warm_starts:
            return
        sound = result is not None and not error and not result.get("error")
        # what counts is a trial's best report: its adapter is what would be published
        self._proposer.tell(number, float(result["best_value"]) if sound and result else None)

    def save(self, checkpoint_path: str) -> None:
        state = (self._proposer, self._count, self._numbers, self.refusals)
        Path(checkpoint_path).write_bytes(pickle.dumps(state))

    def restore(self, checkpoint_path: str) -> None:
        # our own state, in the study's folder; Ray Tune unpickles its own from there too
        self._proposer, self._count, self._numbers, self.refusals = pickle.loads(Path(checkpoint_path).read_bytes())

    def _next(self, number: int) -> Point | None:
        if number < self._study.num_warm_starts:
            return {"warm_start": number}
        for _ in range(MAX_REFUSALS_IN_A_ROW):
            point = self._proposer.propose(number)
            if point is None:
                return None
            try:
                self._study.resolve(point, number)
            except IncompatibleError as error:
                self.refusals.append(str(error))
                self._proposer.tell(number, None)
                continue
            return point
        logging.getLogger(__name__).warning("%d points in a row were refused: the search ends", MAX_REFUSALS_IN_A_ROW)
        return None
