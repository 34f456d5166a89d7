"""A trial in one worker, from config to registry: data, base, training, export, scorecard, publishing.

The launcher (`rankloom.launch`, or a test) supplies a `Session`. The scorecard measures what will be served: the
exported adapter, read back from its folder onto a fresh base.
"""

from __future__ import annotations

import gc
import tempfile
import warnings
from pathlib import Path
from typing import Literal, Required, TypedDict

from pydantic import ValidationError
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging as transformers_logging

from rankloom.adapters.probe import compute_last_logits
from rankloom.adapters.weights import load_adapter
from rankloom.config import TrialConfig
from rankloom.data import TaskData, load_data
from rankloom.errors import RegistryError, TrialError
from rankloom.evals.own_metric import MetricFunction, load_metric
from rankloom.evals.score import measure
from rankloom.events import DataLoaded, PhaseStarted
from rankloom.methods import get_method_class
from rankloom.models import Base, load_tokenizer
from rankloom.models.device import describe_device
from rankloom.registry import Record
from rankloom.registry.checks import RECORD, check_files
from rankloom.registry.scorecard import Extraction, Measures, Scorecard
from rankloom.training import checkpoint
from rankloom.training.loop import TrainingLoop
from rankloom.training.memory import read_free_bytes, read_shape
from rankloom.training.memory_plan import forecast_run, format_gb
from rankloom.training.precision import (
    autocast,
    check_lengths,
    choose_precision,
    describe_precision,
    load_trial_base,
)
from rankloom.training.publish import TrainingCost, probe_ids, publish, score
from rankloom.training.resume_check import Origin, hold_study_to
from rankloom.training.session import Session


class TrialOutcome(TypedDict, total=False):
    """The result of a trial, which crosses processes; from `scorecard` on, of one that is done."""

    status: Required[Literal["done", "interrupted"]]
    name: Required[str]
    steps: Required[int]
    scorecard: Scorecard
    memory_bytes: int
    """Bytes of the base's weights with the adapter."""
    version: int
    """This and the next two: where it was published."""
    registry: str
    adapter: str
    """The version's folder or URL."""


class ScoreOutcome(TypedDict):
    """The measures of an adapter beside its base's."""

    status: Literal["done"]
    name: str
    result: Measures | None
    """None: the base alone was scored."""
    base: Measures


def run_trial(
    trial: TrialConfig,
    session: Session,
    *,
    train: bool = True,
    study: Path | None = None,
    metric: MetricFunction | None = None,
) -> TrialOutcome | None:
    """Train, export, score and publish a trial; every worker calls, rank 0 returns the result.

    Args:
        train: False: skip training and finish an interrupted run with its best checkpoint.
        study: the folder of the trial's study, whose data and base must not change; None: no study.
        metric: the user's own metric as a function; None: `eval.metric` names it.

    Raises:
        DataError, ModelError, TrialError, RegistryError: what failed, for the user to read.
    """
    metric, data = _prepare(trial, session, metric)
    session.emit(DataLoaded(data.report.to_dict()))
    _report_phase(session, "model", _describe_base(trial, session))
    base = load_trial_base(trial, session.device, in_fp32=get_method_class(trial.method).trains_base)
    check_lengths(data, base)
    if study is not None:
        hold_study_to(study, trial, Origin.collect(data, base))
    _check_memory(trial, data, base, session)
    _report_phase(session, "train", f"{trial.method.type} on {session.world_size} worker(s), {session.device}")
    loop = TrainingLoop(trial, base, data, session, choose_precision(trial, session.device), metric)
    for note in loop.method.notes:
        _report_phase(session, "train", note)
    if not train:
        loop.load_best()
    elif not loop.run():
        _report_phase(session, "train", f"stopped at step {loop.progress.step}; the checkpoint is kept")
        return {"status": "interrupted", "name": trial.name, "steps": loop.progress.step}
    module = _load_unsharded(trial, loop, session)
    if session.rank != 0:
        return None
    return _finish(trial, session, loop, module, base, data)


def evaluate(
    trial: TrialConfig, adapter: Path | None, session: Session, metric: MetricFunction | None = None
) -> ScoreOutcome:
    """Score a PEFT folder and its base on the trial's test rows.

    Args:
        adapter: the PEFT folder; None: score the base alone.
        metric: the user's own metric as a function; None: `eval.metric` names it.

    Raises:
        DataError, ModelError, TrialError, RegistryError: what failed, for the user to read.
    """
    metric, data = _prepare(trial, session, metric)
    _report_phase(session, "model", _describe_base(trial, session))
    base = load_trial_base(trial, session.device)
    _report_phase(session, "score", "the base")
    base_measures = measure(base.model, base.tokenizer, data, trial.eval, metric)
    result = None
    if adapter is not None:
        _check_record(adapter, base)
        _report_phase(session, "score", f"{adapter}")
        result = measure(load_adapter(base.model, adapter), base.tokenizer, data, trial.eval, metric)
    return {"status": "done", "name": trial.name, "result": result, "base": base_measures}


def _prepare(
    trial: TrialConfig, session: Session, metric: MetricFunction | None
) -> tuple[MetricFunction | None, TaskData]:
    """Return the metric that a trial is scored by, and its rows."""
    _quieten()
    metric = load_metric(trial.eval.metric, metric)
    _report_phase(session, "data", f"reading {trial.data.train.path}")
    return metric, load_data(trial.data, load_tokenizer(trial.model), retention=trial.eval.retention)


def _describe_base(trial: TrialConfig, session: Session) -> str:
    precision = describe_precision(choose_precision(trial, session.device))
    place = describe_device(session.device)
    return f"loading {trial.model.id} ({trial.quantization.type}), to compute in {precision} on {place}"


def _check_record(adapter: Path, base: Base) -> None:
    """Refuse a published folder whose files or base differ from its record; a folder without a record passes."""
    if not (adapter / RECORD).is_file():
        return
    try:
        record = Record.model_validate_json((adapter / RECORD).read_bytes())
    except ValidationError:
        raise RegistryError(
            f"{adapter / RECORD} is not a record that this version of rankloom can read; publish the folder again"
        ) from None
    check_files(adapter, record)
    if record.base.fingerprint != base.fingerprint:
        raise RegistryError(
            f"{record.ref} was tuned on {record.base.id!r} ({record.base.fingerprint[:19]}…), but model.id={base.id!r} "
            f"has other weights ({base.fingerprint[:19]}…); score it on its own base"
        )


def _check_memory(trial: TrialConfig, data: TaskData, base: Base, session: Session) -> None:
    """Refuse a run that is certain to exceed memory: on a CPU the system would kill the process without an error."""
    free = read_free_bytes(session.device)
    if free is None:
        return
    targets = getattr(trial.method, "target_modules", "all-linear")
    dtype = choose_precision(trial, session.device) if get_method_class(trial.method).trains_base else None
    shape = read_shape(base, data, targets, experts=bool(getattr(trial.method, "experts", None)), dtype=dtype)
    rows = -(-trial.optim.batch_size // (trial.optim.accumulation * session.world_size))
    shards = session.world_size if trial.method.row.parallel == "fsdp" else 1
    loaded = sum(p.numel() * p.element_size() for p in base.model.parameters())
    forecast = forecast_run(
        shape,
        trial.method,
        rows * int(data.train.lengths.min()),
        num_workers=session.world_size,
        accumulates=trial.optim.accumulation > 1,
        recomputes=trial.compute.activation_checkpointing,
        on_gpu=session.device.type == "cuda",
    )
    needed = forecast.peak - loaded / shards
    if needed > free:
        raise TrialError(
            f"method.type={trial.method.type} takes {format_gb(needed)} beside the base, and {format_gb(free)} are "
            f"free on {session.device}; lower optim.batch_size or the method's rank, raise optim.accumulation, set "
            f"compute.activation_checkpointing, or use lora with quantization: nf4"
        )


def _finish(
    trial: TrialConfig, session: Session, loop: TrainingLoop, module: nn.Module, base: Base, data: TaskData
) -> TrialOutcome:
    """Export, read back, score and publish; only rank 0 calls."""
    extracted = trial.method.row.servable == "extracted"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        folder.mkdir()
        trained_logits = compute_last_logits(module.eval(), probe_ids(data))
        trained: Measures | None = None
        if extracted:
            _report_phase(session, "score", "the trained weights, before extraction")
            with autocast(session.device, choose_precision(trial, session.device)):
                trained = measure(module, base.tokenizer, data, trial.eval, loop.metric)
            _keep_model(trial, module, base)  # before the export, which may fail
        method = loop.method
        loop.release()  # the export needs the optimiser's memory
        _report_phase(
            session, "export", "writing the adapter" + (", extracted from the weights' difference" if extracted else "")
        )
        energy = method.export(module, base, folder)
        extraction = None
        if trained is not None and energy is not None:
            extraction = Extraction(rank=trial.method.extract_rank, energy=energy, trained=trained)  # type: ignore[union-attr]
        del module, base, method
        gc.collect()

        fresh = load_trial_base(trial, session.device)
        base_measures = None
        if trial.eval.base:
            _report_phase(session, "score", "the base")
            base_measures = measure(fresh.model, fresh.tokenizer, data, trial.eval, loop.metric)
        _report_phase(session, "score", "the adapter")
        progress = loop.progress
        scored = score(
            folder,
            fresh,
            data,
            trial,
            TrainingCost(
                loop.trainable_parameters, loop.peak_memory_bytes, progress.step, progress.tokens, progress.train_s
            ),
            base_measures=base_measures,
            extraction=extraction,
            trained_logits=None if extracted else trained_logits,
            metric=loop.metric,
        )
        outcome: TrialOutcome = {
            "status": "done",
            "name": trial.name,
            "steps": progress.step,
            "scorecard": scored.scorecard,
            "memory_bytes": scored.memory_bytes,
        }
        if trial.output.publish:
            _report_phase(session, "publish", "into the registry")
            root = trial.output.registry_root
            (record,) = publish(folder, [trial.name], fresh, data, trial, scored.scorecard)
            outcome["version"], outcome["registry"] = record.version, root
            outcome["adapter"] = f"{root}/{trial.name}/{record.version}"
    return outcome


def _load_unsharded(trial: TrialConfig, loop: TrainingLoop, session: Session) -> nn.Module:
    """Return the trained module on one device; rank 0 reads sharded weights back from the best checkpoint."""
    if not isinstance(loop.module, FSDPModule):
        return loop.module
    with session.open_best_checkpoint() as folder:
        if session.rank != 0 or folder is None:
            return loop.module
        model = load_trial_base(trial, session.device, in_fp32=get_method_class(trial.method).trains_base).model
        checkpoint.load_weights(folder, model, loop.method)
        return model


def _keep_model(trial: TrialConfig, module: nn.Module, base: Base) -> None:
    """Save the whole tuned model where `output.keep_model` is set."""
    if trial.output.keep_model:
        folder = Path(trial.output.root).expanduser() / "runs" / trial.name / "model"
        module.save_pretrained(folder)  # type: ignore[operator]
        base.tokenizer.save_pretrained(folder)


def _report_phase(session: Session, phase: str, message: str) -> None:
    session.emit(PhaseStarted(phase, message))


def _quieten() -> None:
    """Silence libraries' progress bars and warnings, which would break the run's own display."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for library in ("transformers", "peft", "torch"):
        warnings.filterwarnings("ignore", module=rf"{library}\..*")
