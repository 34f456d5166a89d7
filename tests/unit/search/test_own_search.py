"""Searchers, schedulers and samplers that were made elsewhere."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from ray import cloudpickle, tune
from ray.tune import schedulers
from ray.tune.search import Searcher
from ray.tune.search.hyperopt import HyperOptSearch

from rankloom.config import StudyConfig, parse
from rankloom.errors import ConfigError
from rankloom.search.own_search import OwnSearch
from rankloom.search.samplers import PriorTrial
from rankloom.search.schedulers import build_scheduler
from rankloom.search.tune_searcher import StudySearcher
from rankloom.search.tuning import count_live

SPACE = [
    {
        "method": {"type": "lora", "rank": {"choice": [2, 4, 8]}},
        "optim": {"learning_rate": {"loguniform": [1e-4, 1e-2]}},
    },
    {"method": {"type": "dora"}, "optim": {"learning_rate": {"loguniform": [1e-3, 1e-2]}}},
]


def study(**sections: Any) -> StudyConfig:
    return parse(StudyConfig, {"name": "s", "space": SPACE, "search": {"num_trials": 12}} | sections)


class Halving(Searcher):  # type: ignore[misc]
    """A user's own: it knows its space by itself, in the trial's words."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.told, self.reports = 1e-2, [], []

    def suggest(self, trial_id: str) -> dict[str, Any]:
        self.rate /= 2
        return {"method.rank": 4, "optim.learning_rate": self.rate}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.reports.append((result["value"], result["training_iteration"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.told.append(result)


def searched(config: StudyConfig, own: OwnSearch, known: list[PriorTrial] | None = None) -> list[dict[str, Any]]:
    """The points of a whole study whose trials' losses are their learning rates."""
    config = own.name_in(config)
    searcher, points = StudySearcher(config, known or [], own), []
    for number in range(config.num_trials):
        point = searcher.suggest(str(number))
        trial = config.resolve({key: value for key, value in point.items() if key not in ("number", "refused")}, number)
        searcher.on_trial_complete(str(number), {"best_value": trial.optim.learning_rate, "error": None})
        points.append(point)
        if number == 5:  # as after --resume
            searcher = cloudpickle.loads(cloudpickle.dumps(searcher))
    return points


@pytest.mark.parametrize(
    "own",
    [
        OwnSearch(sampler=optuna.samplers.CmaEsSampler(seed=1, warn_independent_sampling=False)),
        OwnSearch(sampler=optuna.samplers.NSGAIISampler(seed=1, population_size=4)),
        OwnSearch(searcher=HyperOptSearch(random_state_seed=1, n_initial_points=2)),
    ],
    ids=["cmaes", "nsga2", "hyperopt"],
)
def test_conditional_spaces_work_with_any(own: OwnSearch) -> None:
    pytest.importorskip("cmaes" if "cmaes" in repr(own).lower() else "optuna")
    points = searched(study(), own)
    assert len({str(point) for point in points}) > 8
    assert {point.get("branch") for point in points} == {None, 0, 1}  # None: the baseline
    assert all(("method.rank" in point) == (point.get("branch") == 0) for point in points)
    assert searched(study(), own) == points  # the study works on a copy


def test_a_searcher_of_the_users_own_names_knobs_as_the_trial_does() -> None:
    searcher = Halving()
    guess = PriorTrial({"branch": 0, "method.rank": 2, "optim.learning_rate": 5e-4}, None)
    points = searched(study(space=SPACE[:1]), OwnSearch(searcher=searcher), [guess])
    assert points[1]["optim.learning_rate"] == 5e-4  # the guess comes first
    assert [point["optim.learning_rate"] for point in points[2:5]] == [5e-3, 2.5e-3, 1.25e-3]
    assert searcher.rate == 1e-2
    with pytest.raises(ConfigError, match=r"searcher: Halving gave no '1:optim.learning_rate'|gave no"):
        searched(study(), OwnSearch(searcher=searcher))


def test_earlier_trials_are_told_where_the_searcher_takes_them() -> None:
    prior = PriorTrial({"branch": 1, "optim.learning_rate": 2e-3}, [0.5])
    config = study()
    own = OwnSearch(sampler=optuna.samplers.TPESampler(seed=1))
    assert searched(config, own, [prior]) != searched(config, own)
    with pytest.raises(ConfigError, match=r"search\.priors: Halving can't be told"):
        searched(config, OwnSearch(searcher=Halving()), [prior])


def test_schedulers_are_taken_as_they_are() -> None:
    given = schedulers.ASHAScheduler(time_attr="percent", max_t=100, grace_period=20)
    own = OwnSearch(scheduler=given)
    config = own.name_in(study())
    assert config.scheduler.type == "own"
    built = build_scheduler(config, own)
    assert isinstance(built, schedulers.AsyncHyperBandScheduler)
    assert built is not given
    assert built.set_search_properties("loss", "min")
    assert count_live(config, 1, 8) == 12
    population = schedulers.PopulationBasedTraining(
        time_attr="percent", perturbation_interval=20, hyperparam_mutations={"optim.learning_rate": tune.uniform(0, 1)}
    )
    assert OwnSearch(scheduler=population).name_in(study(space=SPACE[:1])).is_population
    with pytest.raises(ConfigError, match="needs a space of one branch"):
        OwnSearch(scheduler=population).name_in(study())


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"searcher": "hyperopt"}, r"searcher: expected a ray\.tune\.search\.Searcher"),
        ({"sampler": HyperOptSearch}, "sampler: expected an optuna sampler"),
        ({"scheduler": optuna.samplers.RandomSampler()}, r"scheduler: expected a ray\.tune\.schedulers"),
        ({"searcher": Halving(), "sampler": optuna.samplers.RandomSampler()}, "hand one of them over"),
        ({"scheduler": schedulers.HyperBandForBOHB()}, "HyperBandForBOHB"),
    ],
)
def test_other_objects_are_refused(objects: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OwnSearch(**objects).name_in(study())


def test_what_has_a_space_or_metric_of_its_own_is_refused() -> None:
    space = HyperOptSearch({"x": tune.uniform(0, 1)}, metric="loss", mode="min")
    with pytest.raises(ConfigError, match="searcher: it has a space of its own"):
        searched(study(), OwnSearch(searcher=space))
    own = OwnSearch(scheduler=schedulers.ASHAScheduler(metric="accuracy", mode="max"))
    with pytest.raises(ConfigError, match="scheduler: it has a metric or mode of its own"):
        build_scheduler(own.name_in(study()), own)


@pytest.mark.parametrize("tree", [{"search": {"algorithm": "own"}}, {"scheduler": {"type": "own"}}])
def test_own_in_a_file_wants_the_object(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"hand it over with rankloom\.tune"):
        OwnSearch().name_in(study(**tree))


def test_a_searcher_gets_every_report_of_a_trial_that_it_chose() -> None:
    config = study(space=SPACE[:1])
    own = OwnSearch(searcher=Halving())
    searcher = StudySearcher(own.name_in(config), [], own)
    for number in range(2):  # the first is the baseline, which no searcher chose
        searcher.suggest(str(number))
        for report, loss in ((1, 3.0), (2, 2.5)):
            searcher.on_trial_result(str(number), {"loss": loss, "error": None, "training_iteration": report})
        searcher.on_trial_complete(str(number), {"best_value": 2.5, "error": None})
    assert searcher._sampler._search.reports == [(3.0, 1), (2.5, 2)]
    searcher.on_trial_result("1", {"loss": 2.0, "error": None, "training_iteration": 3})  # after its end: nothing
    assert len(searcher._sampler._search.reports) == 2
