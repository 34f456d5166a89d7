"""The Ray cluster that a command uses: its address, its workers' environment and their resources.

`RAY_ADDRESS` names a running cluster (`auto`: the one on this machine); without it a local Ray is started, and
stopped when the command ends. Inside a Ray job `RAY_ADDRESS` is set.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rankloom
from rankloom.config.trial import ComputeConfig
from rankloom.errors import ConfigError, RankloomError
from rankloom.events import OnEvent, PhaseStarted, WarningRaised

CONNECT_TIMEOUT_S = 5.0
OF_THE_CORES = 0.95
"""Share of their cores that workers and hosts reserve; the rest is for a study's trials, which only wait."""
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable in which Ray passes a job's runtime environment to its driver."""

_INHERITED = (
    "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION",
    "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "RANKLOOM_CACHE",
)  # fmt: skip
"""The driver's environment variables that workers of a running cluster get too; no secrets."""


def make_worker_environment(cpus: int, *, gpu: bool) -> dict[str, str]:
    """Return the environment of a worker process that computes on `cpus` cores.

    Args:
        gpu: whether a GPU, or a part of one, is reserved for it; if not, every GPU is hidden from it.
    """
    told = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    if not gpu:
        told["CUDA_VISIBLE_DEVICES"] = ""  # Ray itself would leave it all GPUs of its machine
    return told | {
        "OMP_NUM_THREADS": str(cpus),
        # idle OpenMP threads would spin on cores that Ray's processes and other workers need, so they sleep; but only
        # after a fraction of a millisecond: sleeping between two operations costs a small model a quarter of its speed
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "10000",
        # glibc gives each thread an arena, which does not return freed memory
        "MALLOC_ARENA_MAX": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # nothing of ours compiles, and bitsandbytes' import alone would load the compiler, for two seconds
        "TORCHDYNAMO_DISABLE": os.environ.get("TORCHDYNAMO_DISABLE", "1"),
        # as `models.load_base` sets it, for what a library runs before or beside that
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    }


@dataclass(frozen=True)
class WorkerResources:
    """The resources of every worker."""

    num_workers: int
    cpus: int
    gpu: bool

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)} | ({"GPU": 1.0} if self.gpu else {})

    @property
    def reserved(self) -> dict[str, float]:
        """What Ray sets aside."""
        return self.resources | {"CPU": OF_THE_CORES * self.cpus}


def divide_resources(compute: ComputeConfig, nodes: Sequence[dict[str, float]], *, growing: bool) -> WorkerResources:
    """Divide the cluster's nodes among the workers.

    Args:
        nodes: each node's resources.
        growing: whether nodes may still join; then workers that do not fit yet wait for them.

    Raises:
        ConfigError: the workers don't fit, or CUDA is asked for where no node has a GPU.
    """
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if compute.device == "cuda" and not any(gpus) and not growing:
        raise ConfigError("compute.device=cuda: this cluster has no GPU; set compute.device=cpu, or auto")
    gpu = compute.device == "cuda" or (compute.device == "auto" and any(gpus))
    num_workers = max(1, compute.num_workers)
    cores = [int(node.get("CPU", 0)) for node in nodes]
    cpus = compute.cpus_per_worker or (1 if gpu else _divide_evenly(cores, num_workers))
    seats = sum(min(c // cpus, g) if gpu else c // cpus for c, g in zip(cores, gpus, strict=True))
    if seats < num_workers and not growing:
        raise ConfigError(
            f"compute.num_workers={num_workers} with {cpus} core(s){' and a GPU' if gpu else ''} each: this cluster "
            f"has room for {seats} ({sum(cores)} cores, {sum(gpus)} GPUs); lower compute.num_workers or "
            f"compute.cpus_per_worker"
        )
    return WorkerResources(num_workers, cpus, gpu)


def _divide_evenly(cores: Sequence[int], num_workers: int) -> int:
    """Return the most cores that each of `num_workers` can have at once; at least 1."""
    for cpus in range(max(cores, default=1), 1, -1):
        if sum(c // cpus for c in cores) >= num_workers:
            return cpus
    return 1


@contextmanager
def connect(compute: ComputeConfig) -> Iterator[WorkerResources]:
    """Connect to Ray for the `with` block and yield each worker's resources; an earlier connection stays open.

    Raises:
        RankloomError: the cluster can't be reached. ConfigError: see `divide_resources`.
    """
    with attach() as nodes:
        yield divide_resources(compute, nodes, growing=bool(os.environ.get("RAY_ADDRESS")))


def open_ports() -> str | None:
    """Return a warning if Ray accepts code from anyone who reaches its ports; None if it asks for a token."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "disabled":
        return None
    return (
        "RAY_AUTH_MODE=disabled: Ray's ports listen beyond this machine and run the code of anyone who reaches them; "
        "unset it, or set it to token"
    )


def announce(tell: OnEvent) -> None:
    """Report that a command connects to Ray now, with the warning of `open_ports`."""
    tell(PhaseStarted("launch", "connecting to Ray"))
    if told := open_ports():
        tell(WarningRaised(told))


def starts_ray() -> bool:
    """Return whether `attach` would start a Ray: no address is set and this process is not connected."""
    ray = sys.modules.get("ray")
    return not os.environ.get("RAY_ADDRESS") and not (ray is not None and ray.is_initialized())


@contextmanager
def attach() -> Iterator[list[dict[str, float]]]:
    """Connect to Ray as `connect` does, and yield each node's resources."""
    import ray

    ours = not ray.is_initialized()
    if ours:
        _connect(ray, os.environ.get("RAY_ADDRESS"))
    try:
        yield list_alive_nodes()
    finally:
        if ours:
            ray.shutdown()


def list_alive_nodes() -> list[dict[str, float]]:
    """Return the resources of each node that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def pin_to_this_node() -> dict[str, Any]:
    """Return the options of a small actor that must live on this process's own node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def check_answers(host: str, port: int, address: str) -> None:
    """Raise RankloomError if nothing listens at an address; Ray itself would wait for minutes."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise RankloomError(f"nothing answers at {address}: {error}; is the cluster up?") from None


def _connect(ray: Any, address: str | None) -> None:
    if address and address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={address}: Ray Train does not run through Ray Client; run on a node of the cluster, or send "
            f"the command there: rankloom submit train CONFIG --address http://HEAD:8265"
        )
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit():
        check_answers(host, int(port), f"RAY_ADDRESS={address}")
    # for a local Ray: its processes see only the GPUs reserved for them
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "rankloom"}
    if address:
        options |= {"address": address, "runtime_env": _make_runtime_env()}
    else:
        # the processes of a local Ray are this one's children, with its environment and the driver's module path
        options |= {"address": "local", "include_dashboard": False}
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError, RayError and gRPC's own
        reason = " ".join(str(error).split())
        hint = f"RAY_ADDRESS is {address!r}: is the cluster up?" if address else "is there room in /tmp and in memory?"
        if "authentic" in reason.lower():
            hint = (
                "the cluster and this process disagree on token authentication: set RAY_AUTH_MODE as the cluster was "
                "started; with token, it is read from RAY_AUTH_TOKEN or ~/.ray/auth_token"
            )
        raise RankloomError(f"Ray can't be reached: {type(error).__name__}: {reason[:500]}; {hint}") from None


def _make_runtime_env() -> dict[str, Any]:
    """Ship this package to the cluster's workers, unless the surrounding job brought it."""
    brought = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env") or {}
    return {} if "py_modules" in brought else {"py_modules": [str(Path(rankloom.__file__).parent)]}
