"""StudySearcher: the one searcher that Ray Tune sees, for every search algorithm.

It gives the warm starts first, then asks a *sampler* (`samplers.py`). Each point is resolved to a trial; a point that
can't be is refused and counted, and the sampler is asked again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.tune.search import Searcher

from rankloom.config.space import Point
from rankloom.config.study import StudyConfig
from rankloom.errors import IncompatibleError
from rankloom.search.own_search import OwnSearch
from rankloom.search.samplers import SAMPLERS, PriorTrial, TuneSampler, Values
from rankloom.search.saved_state import load_state
from rankloom.search.suggestion import Suggestion

MAX_REFUSALS_IN_A_ROW = 200
"""After this many the search ends: the space seems to hold no further trial."""


class StudySearcher(Searcher):  # type: ignore[misc]
    """Suggests the warm starts, then the sampler's points that make valid trials.

    A suggestion (`suggestion.py`) is resolved here to check it, and again where its trial runs.
    """

    def __init__(self, study: StudyConfig, priors: Sequence[PriorTrial] = (), own: OwnSearch | None = None) -> None:
        super().__init__(metric=study.search.key, mode=study.search.best)
        self._study = study
        build = own.build_sampler if own and study.search.algorithm == "own" else SAMPLERS[study.search.algorithm]
        self._sampler = build(study, priors)
        self._count = 0
        self._numbers: dict[str, int] = {}
        self._worst: Values | None = None
        self.refusals: list[str] = []
        """Why points were refused."""
        for prior in priors:
            self._note(prior.values)

    def suggest(self, trial_id: str) -> Any:
        if self._count >= self._study.num_trials:
            return Searcher.FINISHED
        number = self._count
        point = self._find_next(number)
        if point is None and self._numbers:
            return None
        if point is None or isinstance(point, str):  # no trial runs, so waiting for one would never end
            return Searcher.FINISHED
        self._count += 1
        self._numbers[trial_id] = number
        return Suggestion(number, len(self.refusals), point).to_config()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        number = self._numbers.get(trial_id, -1)
        chosen = number >= self._study.num_warm_starts
        if chosen and isinstance(self._sampler, TuneSampler) and not result.get("error"):
            self._sampler.report(number, result)  # other samplers learn from results alone

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers.pop(trial_id, None)
        if number is not None and number >= self._study.num_warm_starts:
            self._tell(number, None if error else self._read_values(result))

    def save(self, checkpoint_path: str) -> None:
        state = (self._sampler, self._count, self._numbers, self._worst, self.refusals)
        Path(checkpoint_path).write_bytes(cloudpickle.dumps(state))  # some searchers hold functions

    def restore(self, checkpoint_path: str) -> None:
        state = load_state(Path(checkpoint_path))
        self._sampler, self._count, self._numbers, self._worst, self.refusals = state
        if hasattr(self._sampler, "_study"):  # the saved config may lack this version's fields
            self._sampler._study = self._study

    def _read_values(self, result: dict[str, Any] | None) -> Values | None:
        """Return what to tell the sampler; None if the trial failed or stopped before its costs were measured."""
        if not result or result.get("error"):
            return None
        # a trial's best report counts, since its adapter would be published
        values = [result["best_value"], *(result[name] for name in self._study.search.objectives)]
        return None if None in values else [float(value) for value in values]

    def _tell(self, number: int, values: Values | None) -> None:
        self._note(values)
        # most algorithms learn nothing from a failure, and would propose similar points again
        self._sampler.tell(number, self._worst if values is None else values)

    def _note(self, values: Values | None) -> None:
        if values is not None:
            worse = [max if self._study.search.best == "min" else min, *(max for _ in values[1:])]
            pairs = zip(worse, self._worst or values, values, strict=True)
            self._worst = [choose(before, now) for choose, before, now in pairs]

    def _find_next(self, number: int) -> Point | str | None:
        if number < self._study.num_warm_starts:
            return {"warm_start": number}
        for _ in range(MAX_REFUSALS_IN_A_ROW):
            point = self._sampler.ask(number)
            if point is None or isinstance(point, str):
                return point
            try:
                self._study.resolve(point, number)
            except IncompatibleError as error:
                self.refusals.append(str(error))
                self._tell(number, None)
                continue
            return point
        logging.getLogger(__name__).warning("%d points in a row were refused: the search ends", MAX_REFUSALS_IN_A_ROW)
        return Searcher.FINISHED


def draw_population(study: StudyConfig, priors: Sequence[PriorTrial] = ()) -> dict[str, Any]:
    """Return a parameter space of exactly the searcher's points, since population based training takes no searcher."""
    from ray import tune

    searcher = StudySearcher(study, priors)
    points = [searcher.suggest(str(number)) for number in range(study.num_trials)]
    keys = {key for point in points for key in point} - {"number"}
    drawn = {key: tune.sample_from(_Of([point[key] for point in points])) for key in keys}
    return {"number": tune.grid_search(list(range(len(points))))} | drawn


class _Of:
    """A value by the trial's number, picklable."""

    def __init__(self, values: list[Any]) -> None:
        self._read_values = values

    def __call__(self, spec: Any) -> Any:
        return self._read_values[spec.config.number]
