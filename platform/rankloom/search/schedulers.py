"""Schedulers decide which trials continue: Ray Tune's, with progress as a percentage of each trial's own budget.

Budgets may differ between branches, and so may the steps of budgets in epochs; percentages are comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune import schedulers as tune

from rankloom.config.study import (
    AshaConfig,
    FifoConfig,
    HyperBandConfig,
    MedianConfig,
    PbtConfig,
    StudyConfig,
)
from rankloom.errors import ConfigError
from rankloom.search.flat_space import list_mutations
from rankloom.search.own_search import OwnSearch

PROGRESS = "percent"
"""The key in reports for the used share of a trial's budget, in percent."""
ALL = 100


def _build_fifo(config: FifoConfig, study: StudyConfig) -> Any:  # noqa: ARG001
    return tune.FIFOScheduler()


def _build_asha(config: AshaConfig, study: StudyConfig) -> Any:  # noqa: ARG001
    return tune.ASHAScheduler(
        time_attr=PROGRESS,
        max_t=ALL,
        grace_period=max(1, round(ALL * config.grace)),
        reduction_factor=config.reduction_factor,
        brackets=config.brackets,
    )


def _build_hyperband(config: HyperBandConfig, study: StudyConfig) -> Any:  # noqa: ARG001
    return tune.HyperBandScheduler(time_attr=PROGRESS, max_t=ALL, reduction_factor=config.reduction_factor)


def _build_median(config: MedianConfig, study: StudyConfig) -> Any:  # noqa: ARG001
    return tune.MedianStoppingRule(
        time_attr=PROGRESS, grace_period=ALL * config.grace, min_samples_required=config.min_trials
    )


def _build_pbt(config: PbtConfig, study: StudyConfig) -> Any:
    changed = list_mutations(study)
    if not changed:
        raise ConfigError(
            "scheduler.type=pbt changes optim.learning_rate, optim.loraplus_ratio, optim.weight_decay or "
            "method.dropout while trials run; give the space one of them"
        )
    return tune.PopulationBasedTraining(
        time_attr=PROGRESS,
        perturbation_interval=ALL * config.interval,
        hyperparam_mutations=changed,
        quantile_fraction=config.quantile,
        resample_probability=config.resample,
        log_config=False,
    )


SCHEDULERS: dict[type, Callable[[Any, StudyConfig], Any]] = {
    FifoConfig: _build_fifo,
    AshaConfig: _build_asha,
    HyperBandConfig: _build_hyperband,
    MedianConfig: _build_median,
    PbtConfig: _build_pbt,
}


def build_scheduler(study: StudyConfig, own: OwnSearch | None = None) -> Any:
    """Return Ray Tune's scheduler for this study; `tune.run` sets its metric and mode."""
    if own is not None and own.scheduler is not None:
        return own.build_scheduler(study)
    return SCHEDULERS[type(study.scheduler)](study.scheduler, study)
