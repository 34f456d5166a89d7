"""`evaluate`: score an adapter, or a trial's untuned base, on the trial's test rows; here or in one Ray worker."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankloom.config import TrialConfig
from rankloom.config.paths import resolve_path, resolve_paths
from rankloom.errors import RankloomError, TrialError
from rankloom.evals.own_metric import MetricFunction
from rankloom.events import OnEvent
from rankloom.launch import cluster
from rankloom.launch.background import Background, watch
from rankloom.launch.channel import Channel
from rankloom.launch.failures import Failure, failure_of
from rankloom.launch.handed_over import judged_by


def evaluate(
    trial: TrialConfig,
    adapter: str | None,
    *,
    registry: str,
    on_event: OnEvent = lambda _: None,
    metric: MetricFunction | None = None,
) -> dict[str, Any]:
    """Score an adapter beside its base.

    Args:
        trial: the data, the base and how to measure.
        adapter: a ref of the registry or a PEFT folder; None: the base alone.
        metric: a function in place of `eval.metric` (see `rankloom.evals.own_metric`).

    Returns:
        name, and `result` (None for the base alone) and `base`, each as `rankloom.registry.scorecard.Measures`.
    """
    trial, registry = resolve_paths(judged_by(trial, metric)), resolve_path(registry)
    adapter = None if adapter is None else resolve_path(adapter, or_id=True)
    from rankloom.training.preflight import preflight

    preflight([trial], metric)
    if trial.compute.num_workers == 0:
        from rankloom.models.device import local_device

        try:
            return score(trial, adapter, registry, local_device(trial.compute.device), on_event, metric)
        except Exception as error:
            raise _one_line(failure_of(error)) from None
    cluster.announce(on_event)
    single = trial.compute.model_copy(update={"num_workers": 1})
    with cluster.connected(single) as share:
        import ray

        channel = ray.remote(Channel).options(**cluster.beside_me()).remote()
        task = ray.remote(score_remotely).options(
            num_cpus=share.cpus,
            num_gpus=1 if share.gpu else 0,
            max_retries=trial.compute.max_failures,
            runtime_env={"env_vars": cluster.worker_environment(share.cpus, gpu=share.gpu)},
        )
        arguments = (trial, adapter, registry, channel, share.cpus, metric)
        waiting = Background(lambda: ray.get(task.remote(*arguments)))
        watch(waiting, channel, on_event)
        failure: Failure | None = ray.get(channel.failure.remote())
        if failure is not None:
            raise _one_line(failure) from None
        try:
            scored: dict[str, Any] = waiting.result()
        except ray.exceptions.RayError as error:
            raise _one_line(failure_of(error)) from None
        return scored


def score_remotely(
    trial: TrialConfig,
    adapter: str | None,
    registry: str,
    channel: Any,
    cpus: int,
    metric: MetricFunction | None = None,
) -> Any:
    """What the Ray worker runs; None after an error that the channel holds."""
    import ray
    import torch

    from rankloom.models.device import local_device

    torch.set_num_threads(cpus)
    try:
        device = local_device("cuda" if ray.get_gpu_ids() else "cpu")
        return score(trial, adapter, registry, device, lambda event: ray.get(channel.push.remote([event])), metric)
    except Exception as error:
        ray.get(channel.fail.remote(0, failure_of(error)))
        return None


def score(
    trial: TrialConfig,
    adapter: str | None,
    registry: str,
    device: Any,
    on_event: OnEvent,
    metric: MetricFunction | None = None,
) -> dict[str, Any]:
    """Score in this process."""
    from rankloom.registry import Registry
    from rankloom.training.run import evaluate as score_adapter
    from rankloom.training.session import LocalSession

    with TemporaryDirectory(prefix="rankloom-") as scratch:
        folder = None
        if adapter is not None:
            given, fetched = Path(adapter), Path(scratch) / "adapter"
            folder = given if given.is_dir() else Registry(registry).fetch(adapter, fetched)
        session = LocalSession(Path(scratch) / "run", device=device, on_event=on_event)
        return score_adapter(trial, folder, session, metric)


def _one_line(failure: Failure) -> RankloomError:
    """Nothing is kept on disk for an evaluation, so the trace is part of the message."""
    return TrialError(f"{failure.error}\n{failure.trace}") if failure.trace else failure.error
