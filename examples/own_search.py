"""Search with a sampler of Optuna's and a scheduler of Ray Tune's that are set up here.

python examples/own_search.py [STUDY.yaml]
"""

import sys
from collections.abc import Mapping
from typing import Any

import optuna
from ray.tune.schedulers import ASHAScheduler

import rankloom as rl


def main(config: str | Mapping[str, Any] = "shipped:studies/quickstart.yaml") -> rl.StudyResult:
    study = rl.tune(
        config,
        sampler=optuna.samplers.TPESampler(multivariate=True, group=True, seed=1),
        scheduler=ASHAScheduler(time_attr="percent", max_t=100, grace_period=25),  # in percent of a trial's budget
    )
    print(study)
    return study


if __name__ == "__main__":
    main(*sys.argv[1:])
