"""Measure methods' costs in a worker of the cluster, since the driver has no torch."""

from __future__ import annotations

from typing import Any

from rankloom.config import TrialConfig
from rankloom.evals.own_metric import MetricFunction
from rankloom.launch import cluster
from rankloom.launch.failures import to_failure
from rankloom.registry.scorecard import MethodCost


def measure_cost_remotely(trial: TrialConfig, metric: MetricFunction | None = None) -> MethodCost:
    """Return a trial's `MethodCost`, measured in a process of its own with a trial's share of the cluster.

    Raises:
        RankloomError: as `rankloom.training.method_cost.measure_cost`.
    """
    import ray

    with cluster.connect(trial.compute.model_copy(update={"num_workers": 1})) as share:
        # a fresh process for each: what one leaves in memory is not the next one's
        task: Any = ray.remote(max_calls=1, max_retries=0)(_measure).options(
            num_cpus=share.cpus,
            num_gpus=int(share.gpu),
            runtime_env={"env_vars": cluster.make_worker_environment(share.cpus, gpu=share.gpu)},
        )
        try:
            cost: MethodCost = ray.get(task.remote(trial, metric, share.cpus))
        except Exception as error:
            cause = getattr(error, "cause", error)
            raise to_failure(cause if isinstance(cause, Exception) else error).error from None
        return cost


def _measure(trial: TrialConfig, metric: MetricFunction | None, threads: int) -> MethodCost:
    import torch

    from rankloom.training.method_cost import measure_cost

    torch.set_num_threads(threads)
    return measure_cost(trial, metric)
