"""Score an adapter's folder and publish it: the last step of a trial, and of a study's finalists.

The scorecard measures what will be served: the exported folder, read onto a base that the training did not touch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankloom.adapters.probe import compute_last_logits, compute_tolerance, find_largest_difference, write_probe
from rankloom.adapters.weights import load_adapter
from rankloom.config import TrialConfig, dump
from rankloom.data import TaskData
from rankloom.errors import TrialError
from rankloom.evals.costs import count_weight_bytes
from rankloom.evals.own_metric import MetricFunction
from rankloom.evals.score import RowScore, measure_rows
from rankloom.models import Base
from rankloom.registry import BaseModelRef, Draft, Lineage, Record, Registry, Versions
from rankloom.registry.checks import WEIGHTS
from rankloom.registry.scorecard import Extraction, Measures, Scorecard

PROBE_TOKENS = 64
"""Tokens of the first test row on which an adapter's logits are recorded."""


@dataclass(frozen=True)
class TrainingCost:
    """The costs of an adapter's training."""

    trainable_parameters: int
    peak_memory_bytes: int
    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Score:
    """An adapter's scorecard, the bytes of the base's weights with the adapter's, and the result of each test row."""

    scorecard: Scorecard
    memory_bytes: int
    rows: list[RowScore]


def probe_ids(data: TaskData) -> list[int]:
    """Return the tokens on which the logits of a trained model, its export and its base are compared."""
    return data.test[0].input_ids[:PROBE_TOKENS]


def score(
    folder: Path,
    base: Base,
    data: TaskData,
    trial: TrialConfig,
    cost: TrainingCost,
    *,
    base_measures: Measures | None,
    extraction: Extraction | None = None,
    trained_logits: Tensor | None = None,
    metric: MetricFunction | None = None,
) -> Score:
    """Measure an adapter on the test rows, and write its probe into its folder; the base is unchanged afterwards.

    Args:
        folder: a PEFT folder.
        base_measures: the base's measures; None where `eval.base` is off.
        extraction: how the adapter was extracted from the weights' difference; None: it was trained as an adapter.
        trained_logits: [V], the trained model's logits after `probe_ids`, which the export must reproduce; None: skip
            that check.
        metric: the function of `eval.metric`, where that is the user's own.

    Raises:
        TrialError: the adapter changes nothing, or differs from the trained model.
    """
    ids = probe_ids(data)
    base_logits = compute_last_logits(base.model, ids)
    adapted = load_adapter(base.model, folder)
    try:
        adapter_logits = compute_last_logits(adapted, ids)
        if adapter_logits.equal(base_logits):
            raise TrialError(f"{trial.name}: the adapter changes nothing; train longer or raise optim.learning_rate")
        if trained_logits is not None:
            check_export(adapter_logits, trained_logits, base.quantization)
        result, rows = measure_rows(adapted, base.tokenizer, data, trial.eval, metric)
        memory_bytes = count_weight_bytes(adapted)
    finally:
        adapted.unload()
    write_probe(folder, ids, adapter_logits, base_logits)
    scorecard = Scorecard(
        result=result,
        base=base_measures,
        extraction=extraction,
        trainable_parameters=cost.trainable_parameters,
        adapter_bytes=(folder / WEIGHTS).stat().st_size,
        peak_memory_bytes=cost.peak_memory_bytes,
        steps=cost.steps,
        train_tokens=cost.tokens,
        train_s=cost.seconds,
        tokens_per_s=cost.tokens / max(cost.seconds, 1e-9),
        device=_name_device(base.device),
    )
    return Score(scorecard, memory_bytes, rows)


def check_export(adapter_logits: Tensor, trained_logits: Tensor, quantization: str) -> None:
    """Refuse an export whose logits differ from the trained model's by more than rounding.

    Args:
        adapter_logits: [V], of the export.
        trained_logits: [V], of the trained model.
        quantization: the base's.

    Raises:
        TrialError: the logits differ by more than the tolerance.
    """
    difference = find_largest_difference(adapter_logits, trained_logits)
    allowed = compute_tolerance(trained_logits, adapter_logits.dtype, quantization=quantization)
    if not difference <= allowed:
        raise TrialError(
            f"the exported adapter's logits differ by {difference:.3g} from the trained model's; allowed: {allowed:.3g}"
        )


def publish(
    folder: Path,
    names: Sequence[str],
    base: Base,
    data: TaskData,
    trial: TrialConfig,
    scorecard: Scorecard,
    *,
    study: str | None = None,
) -> list[Record]:
    """Publish a scored folder under each name, unless this run did so before.

    Returns:
        The record under each name, new or earlier.

    Raises:
        RegistryError: the registry can't be written.
    """
    draft = Draft(
        method=trial.method.type,
        base=BaseModelRef(id=base.id, fingerprint=base.fingerprint, quantization=trial.quantization.type),
        servable=trial.method.row.servable,
        trial=dump(trial),
        data_fingerprint=data.fingerprint,
        scorecard=scorecard,
        lineage=Lineage(run=trial.name, study=study),
        versions=Versions.from_installed(),
    )
    registry = Registry(trial.output.registry_root)
    return [registry.publish_once(name, folder, draft) for name in names]


def _name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}"
