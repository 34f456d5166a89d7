"""The end of a study: score its best adapters on the test rows and publish them, in a host's process.

The test rows are read here for the first time: the search saw only the validation rows, and the winner is the best
trial on those. The test rows only measure it.
"""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open

from rankloom.config.study import make_host_key
from rankloom.data import TaskData, load_data
from rankloom.errors import TrialError
from rankloom.evals.own_metric import MetricFunction
from rankloom.evals.score import measure
from rankloom.events import OnEvent, PhaseStarted
from rankloom.launch.handed_over import load_study_metric
from rankloom.models import Base, load_tokenizer
from rankloom.models.device import choose_device
from rankloom.registry.checks import WEIGHTS
from rankloom.registry.scorecard import Measures
from rankloom.search.finalists import Finalist, FinalistScore
from rankloom.training.precision import load_trial_base
from rankloom.training.publish import TrainingCost, publish, score
from rankloom.training.resume_check import Origin, hold_study_to


def score_finalists(study: str, finalists: list[Finalist], on_event: OnEvent) -> list[FinalistScore]:
    """Score the finalists and publish them.

    Args:
        study: the study's name, for the lineage.
    """
    results: dict[int, FinalistScore] = {}
    keys = [make_host_key(finalist.trial) for finalist in finalists]
    for key in dict.fromkeys(keys):
        mine = [i for i, other in enumerate(keys) if other == key]
        trial = finalists[mine[0]].trial
        base = load_trial_base(trial, choose_device(trial.compute.device))
        data = load_data(trial.data, load_tokenizer(trial.model), retention=trial.eval.retention)
        hold_study_to(Path(finalists[mine[0]].folder).parents[1], trial, Origin.of(data, base))
        on_event(PhaseStarted("score", "the base"))
        metric = load_study_metric(trial.eval.metric, Path(finalists[mine[0]].folder).parents[1])
        base_measures = measure(base.model, base.tokenizer, data, trial.eval, metric) if trial.eval.base else None
        for i in mine:
            name = finalists[i].trial.name
            on_event(PhaseStarted("score", f"{name} on the test rows"))
            try:
                results[i] = _score(study, finalists[i], base, base_measures, data, metric)
            except TrialError as error:
                results[i] = FinalistScore(error=str(error))
    return [results[i] for i in range(len(finalists))]


def _score(
    study: str,
    finalist: Finalist,
    base: Base,
    base_measures: Measures | None,
    data: TaskData,
    metric: MetricFunction | None,
) -> FinalistScore:
    trial, folder = finalist.trial, Path(finalist.folder)
    if not folder.is_dir():
        raise TrialError(f"{trial.name}: no adapter at {folder}; it may have been deleted")
    cost = TrainingCost(
        _count_parameters(folder), finalist.memory_bytes, finalist.steps, finalist.tokens, finalist.train_s
    )
    scorecard = score(folder, base, data, trial, cost, base_measures=base_measures, metric=metric).scorecard
    records = publish(folder, finalist.names, base, data, trial, scorecard, study=study)
    return FinalistScore(scorecard=scorecard, published=[record.ref for record in records])


def _count_parameters(folder: Path) -> int:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in list(file.keys()))
