"""Importance: how much each knob matters for being among a study's best trials, by Optuna's PED-ANOVA.

PED-ANOVA (arXiv 2304.10255, with conditions 2601.20800) knows that a branch's knobs exist in that branch alone.
"""

from __future__ import annotations

from contextlib import suppress

from rankloom.search.leaderboard import Leaderboard
from rankloom.search.optuna_storage import list_parameters, silence_optuna

MIN_TRIALS = 10
"""Trials drawn from the space below which no importance is given."""
TOP_TRIALS = 5
"""Least trials that count as the best: fewer make PED-ANOVA unstable."""


def measure_importances(leaderboard: Leaderboard) -> dict[str, float]:
    """Return parameter -> its share of the importance, the largest first; empty where there is too little to tell.

    The parameters are named as in `search/optuna_storage.py`. A trial that was stopped counts with its best value.
    """
    import optuna

    config, values = leaderboard.study, set()
    with silence_optuna():
        study = optuna.create_study()
        for trial in leaderboard.rank_trials():
            params, distributions = list_parameters(config, trial.point)
            best = trial.find_best(config.search)
            if params and best is not None:
                value = -config.search.sign * best.get_value(config.search.key)
                values.add(value)
                with suppress(ValueError):  # outside the space, where population based training has brought it
                    study.add_trial(optuna.trial.create_trial(value=value, params=params, distributions=distributions))
        count = len(study.trials)
        if count < MIN_TRIALS or len(values) < 2:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, TOP_TRIALS / count))
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in found.items()}
