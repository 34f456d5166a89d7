"""The end of a study: score its best adapters on the test rows and publish them, in a host's process.

The test rows are read here for the first time: the search saw only the validation rows, and the winner is the best
trial on those. The test rows only measure it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet
from safetensors import safe_open

from rankloom.data import TaskData, load_data
from rankloom.errors import RegistryError, TrialError
from rankloom.evals.own_metric import MetricFunction
from rankloom.evals.score import RowScore, measure_rows
from rankloom.events import OnEvent, PhaseStarted
from rankloom.launch.handed_over import load_study_metric
from rankloom.models import Base, load_tokenizer
from rankloom.models.device import choose_device
from rankloom.registry.checks import WEIGHTS
from rankloom.registry.scorecard import Measures
from rankloom.search.finalists import Finalist, FinalistScore, get_base_rows_file, get_rows_file
from rankloom.training.precision import load_trial_base
from rankloom.training.publish import TrainingCost, publish, score
from rankloom.training.resume_check import Origin, hold_study_to


def score_finalists(study: str, finalists: list[Finalist], on_event: OnEvent) -> list[FinalistScore]:
    """Score finalists that share a base and data, and publish them.

    Args:
        study: the study's name, for the lineage.
    """
    trial = finalists[0].trial
    folder = Path(finalists[0].folder).parents[1]
    base = load_trial_base(trial, choose_device(trial.compute.device))
    data = load_data(trial.data, load_tokenizer(trial.model), retention=trial.eval.retention)
    hold_study_to(folder, trial, Origin.collect(data, base))
    metric = load_study_metric(trial.eval.metric, folder)
    base_measures = None
    if trial.eval.base:
        on_event(PhaseStarted("score", "the base"))
        base_measures, rows = measure_rows(base.model, base.tokenizer, data, trial.eval, metric)
        write_rows(get_base_rows_file(folder, trial), rows)
    results = []
    for finalist in finalists:
        on_event(PhaseStarted("score", f"{finalist.trial.name} on the test rows"))
        try:
            results.append(_score(study, finalist, base, base_measures, data, metric))
        except TrialError as error:
            results.append(FinalistScore(error=str(error)))
    return results


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
    own = finalist.own_run
    cost = (
        TrainingCost(own.trainable_parameters, own.peak_memory_bytes, own.steps, own.train_tokens, own.train_s)
        if own is not None
        else TrainingCost(
            _count_parameters(folder), finalist.memory_bytes, finalist.steps, finalist.tokens, finalist.train_s
        )
    )
    extraction = own.extraction if own is not None else None
    scored = score(
        folder, base, data, trial, cost, base_measures=base_measures, extraction=extraction, metric=metric
    )  # fmt: skip
    write_rows(get_rows_file(folder.parents[1], folder.name), scored.rows)
    records = publish(folder, finalist.names, base, data, trial, scored.scorecard, study=study)
    return FinalistScore(scorecard=scored.scorecard, published=[record.ref for record in records])


def write_rows(path: Path, rows: Sequence[RowScore]) -> None:
    """Write the results on each test row, in the rows' order.

    Raises:
        RegistryError: the study's folder can't be written.
    """
    text, real = pa.string(), pa.float64()
    schema = pa.schema(
        [("loss", real), ("weight", real), ("reference", text), ("prediction", text), ("metric", real)]
    )  # fmt: skip
    staged = path.with_suffix(".staged")
    try:
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=schema), staged)
        staged.replace(path)
    except OSError as error:
        raise RegistryError(f"{path} can't be written: {error}; make room, and --resume continues") from None


def _count_parameters(folder: Path) -> int:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in list(file.keys()))
