"""The end of a study: its best adapters on the test rows, and into the registry. It runs in a host's process.

The test rows are read here for the first time: the search saw the validation rows alone, and the winner is the trial
that was best there. The test rows only say how good it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rankloom.config import TrialConfig, parse
from rankloom.config.study import host_key
from rankloom.data import TaskData, load_data
from rankloom.errors import TrialError
from rankloom.evals.score import measure
from rankloom.models import Base, load_tokenizer
from rankloom.models.device import local_device
from rankloom.registry.checks import WEIGHTS
from rankloom.registry.scorecard import Measures
from rankloom.training.precision import load_trial_base
from rankloom.training.publish import TrainingCost, publish, score
from rankloom.training.resume_check import Origin, hold_study_to

Finalist = dict[str, Any]
"""trial (its config's tree), folder (its adapter), names (to publish under), steps, tokens, train_s, memory_bytes."""


def score_finalists(
    study: str, finalists: list[Finalist], on_event: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Score and publish; for each finalist `scorecard`, or `error`, and `published` (refs).

    Args:
        study: its name, for the lineage.
    """
    results: dict[int, dict[str, Any]] = {}
    keys = [host_key(parse(TrialConfig, finalist["trial"])) for finalist in finalists]
    for key in dict.fromkeys(keys):
        mine = [i for i, other in enumerate(keys) if other == key]
        trial = parse(TrialConfig, finalists[mine[0]]["trial"])
        base = load_trial_base(trial, local_device(trial.compute.device))
        data = load_data(trial.data, load_tokenizer(trial.model), retention=trial.eval.retention)
        hold_study_to(Path(finalists[mine[0]]["folder"]).parents[1], trial, Origin.of(data, base))
        on_event({"event": "phase", "phase": "score", "message": "the base"})
        base_measures = measure(base.model, base.tokenizer, data, trial.eval) if trial.eval.base else None
        for i in mine:
            name = finalists[i]["trial"]["name"]
            on_event({"event": "phase", "phase": "score", "message": f"{name} on the test rows"})
            try:
                results[i] = _score(study, finalists[i], base, base_measures, data)
            except TrialError as error:
                results[i] = {"error": str(error), "published": []}
    return [results[i] for i in range(len(finalists))]


def _score(
    study: str, finalist: Finalist, base: Base, base_measures: Measures | None, data: TaskData
) -> dict[str, Any]:
    trial, folder = parse(TrialConfig, finalist["trial"]), Path(finalist["folder"])
    if not folder.is_dir():
        raise TrialError(f"{trial.name}: no adapter at {folder}; it may have been deleted")
    cost = TrainingCost(
        _num_parameters(folder),
        finalist["memory_bytes"],
        finalist["steps"],
        finalist["tokens"],
        finalist["train_s"],
    )
    scorecard = score(folder, base, data, trial, cost, base_measures=base_measures).scorecard
    records = publish(folder, finalist["names"], base, data, trial, scorecard, study=study)
    return {"scorecard": scorecard.model_dump(), "published": [record.ref for record in records], "error": None}


def _num_parameters(folder: Path) -> int:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in list(file.keys()))
