"""Ray Tune's or Optuna's objects that Python code hands over in place of `search.algorithm` and `scheduler`.

A study resumes from the state in its folder, and needs the objects again. Each study works on copies, so that several
may use one object.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from rankloom.config import StudyConfig, dump, parse
from rankloom.config.space import Point
from rankloom.config.study import OwnSchedulerConfig
from rankloom.errors import ConfigError
from rankloom.search import flat_space
from rankloom.search.samplers import FINISHED, OptunaSampler, PriorTrial, Sampler, TuneSampler, Values


@dataclass(frozen=True)
class OwnSearch:
    """The objects that were handed over; None: the config decides."""

    searcher: Any = None
    """A `ray.tune.search.Searcher`."""
    sampler: Any = None
    """An `optuna.samplers.BaseSampler`."""
    scheduler: Any = None
    """A `ray.tune.schedulers.TrialScheduler`."""

    def name_in(self, study: StudyConfig) -> StudyConfig:
        """Return the study with `own` where an object was handed over.

        Raises:
            ConfigError: an object is of another kind, or `own` is in the config and no object was handed over.
        """
        tree = dump(study)
        if self.searcher is not None and self.sampler is not None:
            raise ConfigError("searcher and sampler: both choose the points; hand one of them over")
        if self.searcher is not None or self.sampler is not None:
            self._check_algorithm()
            tree["search"]["algorithm"] = "own"
        elif study.search.algorithm == "own":
            raise ConfigError(
                "search.algorithm=own stands for an object: hand it over with rankloom.tune(..., searcher=...) or "
                "sampler=..."
            )
        if self.scheduler is not None:
            tree["scheduler"] = {"type": "own", "is_population": self._is_population()}
        elif isinstance(study.scheduler, OwnSchedulerConfig):
            raise ConfigError(
                "scheduler.type=own stands for an object: hand it over with rankloom.tune(..., scheduler=...)"
            )
        return parse(StudyConfig, tree, "study")

    def build_sampler(self, study: StudyConfig, known: Sequence[PriorTrial]) -> Sampler:
        """Return the search algorithm on a copy of the object."""
        if self.sampler is not None:
            return OptunaSampler(study, known, sampler=_copy(self.sampler, "sampler"))
        return OwnSearcher(study, known, _copy(self.searcher, "searcher"))

    def build_scheduler(self, study: StudyConfig) -> Any:
        """Return a copy of the scheduler, after a check that the study can set its metric."""
        if not _copy(self.scheduler, "scheduler").set_search_properties(study.search.key, study.search.best):
            raise ConfigError("scheduler: it has a metric or mode of its own; omit both, which the study sets")
        return _copy(self.scheduler, "scheduler")

    def _check_algorithm(self) -> None:
        from ray.tune.search import Searcher

        if self.searcher is not None and not isinstance(self.searcher, Searcher):
            raise ConfigError(
                f"searcher: expected a ray.tune.search.Searcher, such as HyperOptSearch() (given "
                f"{type(self.searcher).__name__})"
            )
        if self.sampler is not None:
            import optuna

            if not isinstance(self.sampler, optuna.samplers.BaseSampler):
                raise ConfigError(
                    f"sampler: expected an optuna sampler, such as CmaEsSampler() (given {type(self.sampler).__name__})"
                )

    def _is_population(self) -> bool:
        """Return whether the scheduler copies weights between trials, whose points are then all drawn first."""
        from ray.tune import schedulers

        if not isinstance(self.scheduler, schedulers.TrialScheduler):
            raise ConfigError(
                f"scheduler: expected a ray.tune.schedulers.TrialScheduler, such as ASHAScheduler() (given "
                f"{type(self.scheduler).__name__})"
            )
        for refused in (schedulers.HyperBandForBOHB, schedulers.ResourceChangingScheduler):
            if isinstance(self.scheduler, refused):
                raise ConfigError(
                    f"scheduler: {refused.__name__} needs a searcher or resources of its own, and trials share "
                    f"a host here; use HyperBandScheduler or ASHAScheduler"
                )
        return isinstance(self.scheduler, schedulers.PopulationBasedTraining)


class OwnSearcher(TuneSampler):
    """A searcher of Ray Tune that Python code handed over.

    It sees the flat space, `0:optim.learning_rate` for a knob of branch 0. A searcher with a space of its own may omit
    `0:` where the study has one branch.
    """

    def __init__(self, study: StudyConfig, known: Sequence[PriorTrial], searcher: Any) -> None:
        from ray.tune.search import Searcher

        self._begin(study, searcher)
        self._guesses = [each.point for each in known if each.values is None]
        self._guessed: dict[int, Point] = {}
        by_itself = type(searcher).set_search_properties is Searcher.set_search_properties
        try:
            accepted = searcher.set_search_properties("value", study.search.best, flat_space.to_flat_domains(study))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"searcher: {type(searcher).__name__} can't search this space: {error}") from None
        if not accepted and not by_itself:
            raise ConfigError("searcher: it has a space of its own; omit space, metric and mode, which the study sets")
        for each in known:
            if each.values is not None and not self._add(each.point, each.values):
                raise ConfigError(
                    f"search.priors: {type(searcher).__name__} can't be told of earlier trials; remove them, or use "
                    f"sampler=..."
                )

    def ask(self, number: int) -> Point | Literal["FINISHED"] | None:
        if self._guesses:
            self._guessed[number] = self._guesses.pop(0)
            return self._guessed[number]
        params = self._suggest(number)
        if params is None or params == FINISHED:
            return params
        if len(self._study.space) == 1:
            params = {name if ":" in name else f"0:{name}": value for name, value in params.items()}
        try:
            return flat_space.to_point(self._study, params)
        except (KeyError, IndexError) as error:
            raise ConfigError(
                f"searcher: {type(self._search).__name__} gave no {error} among {sorted(params)}; it must give one "
                f"for each of {sorted(flat_space.to_flat_domains(self._study))}"
            ) from None

    def tell(self, number: int, values: Values | None) -> None:
        if number not in self._guessed:
            super().tell(number, values)
        elif values is not None:
            self._add(self._guessed.pop(number), values)

    def _add(self, point: Point, values: Values) -> bool:
        with suppress(NotImplementedError):
            params = flat_space.to_params(self._study, point, all_branches=True)
            self._search.add_evaluated_point(params, values[0])
            return True
        return False


def _copy(given: Any, field: str) -> Any:
    from ray import cloudpickle

    try:
        return cloudpickle.loads(cloudpickle.dumps(given))
    except Exception as error:  # whatever it refers to may fail to pickle
        raise ConfigError(f"{field}: {type(given).__name__} can't be saved with the study: {error}") from None
