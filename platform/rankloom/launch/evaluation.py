"""Score an adapter, or a trial's untuned base, on the trial's test rows; here or in one Ray worker."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rankloom.config import TrialConfig, coerce, dump, load, parse
from rankloom.config.base import apply_overrides
from rankloom.config.files import is_config_file
from rankloom.config.metric import drop_own
from rankloom.config.paths import resolve_path, resolve_paths
from rankloom.errors import AdapterNotFoundError, ConfigError, RankloomError, TrialError
from rankloom.evals.own_metric import MetricFunction
from rankloom.events import OnEvent
from rankloom.launch import cluster
from rankloom.launch.background import Background, watch
from rankloom.launch.channel import Channel
from rankloom.launch.failures import Failure, to_failure
from rankloom.launch.handed_over import use_trial_metric, use_trial_rows
from rankloom.launch.results import EvaluationResult
from rankloom.paths import get_registry_root
from rankloom.registry import Record, Registry
from rankloom.registry.checks import RECORD

if TYPE_CHECKING:
    from rankloom.training.run import ScoreOutcome


def score_subject(
    subject: str | Path | TrialConfig | Mapping[str, Any],
    *,
    overrides: Sequence[str],
    data: Any,
    metric: MetricFunction | None,
    registry: str | None,
    on_event: OnEvent,
) -> EvaluationResult:
    """Score an adapter beside its base, or a trial's untuned base, on the trial's test rows, as `rl.evaluate` says."""
    trial, adapter = resolve_subject(subject, registry or get_registry_root(), overrides, has_rows=data is not None)
    trial = use_trial_rows(trial, data, "test")
    scored = score_adapter(trial, adapter, metric=metric, registry=registry or get_registry_root(), on_event=on_event)
    return EvaluationResult.model_validate({**scored, "adapter": adapter})


def resolve_subject(
    subject: str | Path | TrialConfig | Mapping[str, Any],
    registry: str,
    overrides: Sequence[str] = (),
    *,
    has_rows: bool = False,
) -> tuple[TrialConfig, str | None]:
    """Return the trial to score by and the adapter: a ref with its number, a folder, or None for the trial's base.

    Args:
        has_rows: whether rows come from elsewhere, so that the adapter's record need not name any.
    """
    if isinstance(subject, (str, Path)) and is_config_file(str(subject)):
        return load(TrialConfig, subject, overrides), None
    if not isinstance(subject, (str, Path)):
        return parse(TrialConfig, apply_overrides(dump(coerce(TrialConfig, subject)), overrides), "trial"), None
    folder = Path(subject).expanduser()
    if folder.is_dir():
        try:
            record = Record.model_validate_json((folder / RECORD).read_bytes())
        except (OSError, ValidationError):
            raise ConfigError(
                f"{subject}: a folder without rankloom's {RECORD} does not name its base and data; publish it "
                f"first: rankloom adapters publish {shlex.quote(str(subject))} --name NAME --base BASE"
            ) from None
        adapter = str(folder)
    else:
        try:
            record = Registry(registry).get(str(subject))
        except AdapterNotFoundError as error:
            raise AdapterNotFoundError(f"{error}; for a config give a .yaml file") from None
        adapter = record.ref
    if (
        record.data_fingerprint is None
        and not has_rows
        and not any(override.startswith("data.") for override in overrides)
    ):
        raise ConfigError(f"{record.ref} was not trained by rankloom: name the rows, for example data.test=rows.csv")
    return parse(TrialConfig, apply_overrides(drop_own(record.trial), overrides), f"the trial of {record.ref}"), adapter


def score_adapter(
    trial: TrialConfig,
    adapter: str | None,
    *,
    registry: str,
    on_event: OnEvent = lambda _: None,
    metric: MetricFunction | None = None,
) -> ScoreOutcome:
    """Score an adapter (a ref or a PEFT folder; None: the base alone) by a trial, here or in one Ray worker."""
    trial, registry = resolve_paths(use_trial_metric(trial, metric)), resolve_path(registry)
    adapter = None if adapter is None else resolve_path(adapter, or_id=True)
    from rankloom.training.preflight import preflight

    preflight([trial], metric)
    if trial.compute.num_workers == 0:
        from rankloom.models.device import choose_device

        try:
            return score(trial, adapter, registry, choose_device(trial.compute.device), on_event, metric)
        except Exception as error:
            raise _to_one_line(to_failure(error)) from None
    cluster.announce(on_event)
    single = trial.compute.model_copy(update={"num_workers": 1})
    with cluster.connect(single) as share:
        import ray

        channel = ray.remote(Channel).options(**cluster.pin_to_this_node()).remote()
        task = ray.remote(score_remotely).options(
            num_cpus=share.cpus,
            num_gpus=1 if share.gpu else 0,
            max_retries=trial.compute.max_failures,
            runtime_env={"env_vars": cluster.make_worker_environment(share.cpus, gpu=share.gpu)},
        )
        arguments = (trial, adapter, registry, channel, share.cpus, metric)
        waiting = Background(lambda: ray.get(task.remote(*arguments)))
        watch(waiting, channel, on_event)
        failure: Failure | None = ray.get(channel.failure.remote())
        if failure is not None:
            raise _to_one_line(failure) from None
        try:
            scored: ScoreOutcome = waiting.result()
        except ray.exceptions.RayError as error:
            raise _to_one_line(to_failure(error)) from None
        return scored


def score_remotely(
    trial: TrialConfig,
    adapter: str | None,
    registry: str,
    channel: Any,
    cpus: int,
    metric: MetricFunction | None = None,
) -> Any:
    """Score in a Ray worker; return None after an error, which the channel holds."""
    import ray
    import torch

    from rankloom.models.device import choose_device

    torch.set_num_threads(cpus)
    try:
        device = choose_device("cuda" if ray.get_gpu_ids() else "cpu")
        return score(trial, adapter, registry, device, lambda event: ray.get(channel.push.remote([event])), metric)
    except Exception as error:
        ray.get(channel.fail.remote(0, to_failure(error)))
        return None


def score(
    trial: TrialConfig,
    adapter: str | None,
    registry: str,
    device: Any,
    on_event: OnEvent,
    metric: MetricFunction | None = None,
) -> ScoreOutcome:
    """Score in this process."""
    from rankloom.training.run import evaluate as score_adapter
    from rankloom.training.session import LocalSession

    with TemporaryDirectory(prefix="rankloom-") as scratch:
        folder = None
        if adapter is not None:
            given, fetched = Path(adapter), Path(scratch) / "adapter"
            folder = given if given.is_dir() else Registry(registry).fetch(adapter, fetched)
        session = LocalSession(Path(scratch) / "run", device=device, on_event=on_event)
        return score_adapter(trial, folder, session, metric)


def _to_one_line(failure: Failure) -> RankloomError:
    """Return one error with its trace in the message, since an evaluation keeps no files."""
    return TrialError(f"{failure.error}\n{failure.trace}") if failure.trace else failure.error
