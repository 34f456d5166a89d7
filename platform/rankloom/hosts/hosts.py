"""Hosts of a study: one group for each base and data, one host a device, made when they are needed.

`Hosts` is an actor that trials ask for a seat. It spreads them by load, opens another host of a group where the open
ones are full and a device is left, and gives a host back that has been empty for a while.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankloom.config import StudyConfig, TrialConfig
from rankloom.config.study import host_key, is_fusable
from rankloom.errors import ConfigError
from rankloom.hosts.host_actor import HostActor
from rankloom.hosts.host_loop import BankShape, HostDevice
from rankloom.launch import cluster

IDLE_S = 30.0
"""A host without members is given back after so long."""
SWEEP_EVERY_S = 5.0
OF_THE_CORES = 0.9
"""What hosts reserve of the cores: the rest is for the trials, which only wait."""
POLL_TIMEOUT_S = 0.5
CLOSE_TIMEOUT_S = 3.0


def groups(study: StudyConfig) -> dict[str, TrialConfig]:
    """`host_key` -> a trial with it: each is a base and a data set that trials can share."""
    found: dict[str, TrialConfig] = {}
    for trial in study.members():
        if is_fusable(trial):
            found.setdefault(host_key(trial), trial)
    return found


def bank_of(study: StudyConfig) -> BankShape:
    """The ranks in the space (of a range, its ends), and whether there is DoRA in it."""
    fusable = [trial for trial in study.members() if is_fusable(trial)]
    ranks = {int(trial.method.rank) for trial in fusable} or {1}  # type: ignore[union-attr]
    if study.hosts.max_rank:
        ranks = {min(rank, study.hosts.max_rank) for rank in (*ranks, study.hosts.max_rank)}
    return BankShape(tuple(sorted(ranks)), any(trial.method.type == "dora" for trial in fusable))


@dataclass(frozen=True)
class HostPlan:
    """How a study shares out a cluster."""

    hosts_per_group: int
    device: HostDevice
    dedicated_cpus: int
    """Cores of a worker of a trial that can't share a base."""


def share_out(study: StudyConfig, nodes: Sequence[dict[str, float]]) -> HostPlan:
    """Divide the cluster: the groups share every device, and on CPUs dedicated runs have a part as large as a group's.

    On CPUs a node is a device. On GPUs a dedicated run waits until a device is given back.

    Args:
        nodes: each node's resources.

    Raises:
        ConfigError: CUDA is asked for where there is no GPU.
    """
    compute = study.baseline.compute
    num_groups = len(groups(study))
    parts = max(1, num_groups + any(not is_fusable(trial) for trial in study.members()))
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if compute.device == "cuda" and not gpus:
        raise ConfigError("compute.device=cuda: this cluster has no GPU; set trial.compute.device=cpu, or auto")
    on_gpu = gpus > 0 and compute.device != "cpu"
    sizes = [node.get("CPU", 0.0) for node in nodes]
    # as many cores as can be had on as many nodes as possible; smaller nodes have no host
    cores = max(1.0, max(sizes, key=lambda size: (size * sum(other >= size for other in sizes), size)))
    large = [node for node in nodes if node.get("CPU", 0.0) >= cores] or list(nodes)
    num_devices = gpus if on_gpu else len(large)
    num_hosts = study.hosts.max_hosts or num_devices
    shared_by = parts * -(-num_hosts // len(large))
    cpus = OF_THE_CORES * cores / shared_by
    threads = compute.cpus_per_worker or max(1, int(cores / shared_by))
    memory = min(node.get("memory", math.inf) for node in large) / shared_by
    gpu = int(1e4 * min(1.0, gpus / num_hosts) / max(1, num_groups)) / 1e4 if on_gpu else 0.0
    device = HostDevice(min(cpus, 1.0) if on_gpu else cpus, gpu, threads, memory)
    return HostPlan(num_hosts, device, max(1, int(cores / parts)))


@dataclass
class RunningHost:
    """A host that runs."""

    key: str
    label: str
    handle: Any
    trials: set[str] = field(default_factory=set)
    empty_since: float = math.inf
    """Nobody sits in it since then; one in which nobody ever sat is loading, or waits for the first trials."""


class Hosts:
    """The actor; all its methods are short."""

    def __init__(self, study: StudyConfig, nodes: Sequence[dict[str, float]], folder: Path | None = None) -> None:
        """`folder`: the study's, where it is kept what its trials come from; None: it is not."""
        self._study, self._folder = study, folder
        self._groups = groups(study)
        self._bank = bank_of(study)
        plan = share_out(study, nodes)
        self._max_hosts, self._device = plan.hosts_per_group, plan.device
        self._open: list[RunningHost] = []
        self._count = 0
        self._sweeper: asyncio.Task[None] | None = None

    async def prepare(self) -> list[Any]:
        """Open hosts of each group, so that their bases load while the first trials start; their handles."""
        self._sweeper = self._sweeper or asyncio.create_task(self._sweep())
        trials = self._study.num_trials / max(1, len(self._groups))
        num_hosts = min(self._max_hosts, math.ceil(trials / self._study.hosts.num_slots))
        return [self._start(key).handle for key in self._groups for _ in range(num_hosts)]

    async def assign(self, trial_id: str, trial: TrialConfig) -> Any:
        """The handle of the host that a trial is to join."""
        self._release(trial_id)
        key = host_key(trial)
        self._groups.setdefault(key, trial)
        host = self._host_of(key)
        host.trials.add(trial_id)
        return host.handle

    async def any(self, trial: TrialConfig) -> Any:
        """The handle of some open host, to `work` in; of a new one, for this trial's group, where none is open.

        The search is over then, and no host is given back any more: the one that works has no members.
        """
        self._stop_sweeping()
        if not self._open:
            self._groups.setdefault(host_key(trial), trial)
            self._start(host_key(trial), to_train=False)
        return self._open[0].handle

    async def release(self, trial_id: str) -> None:
        """A trial left its host."""
        self._release(trial_id)

    async def gone(self, trial_id: str) -> None:
        """A trial's host is dead and does not return: the cluster may have shrunk. Its trials look for another."""
        import ray

        for host in [host for host in self._open if trial_id in host.trials]:
            self._open.remove(host)
            ray.kill(host.handle)
            self._max_hosts = share_out(self._study, cluster.alive()).hosts_per_group

    async def close(self) -> None:
        """The study is over: end the hosts."""
        self._stop_sweeping()
        await asyncio.gather(*map(self._end, self._open))

    async def stats(self) -> list[dict[str, Any]]:
        """What the hosts say of themselves; one that is loading or down says nothing."""
        asked = [asyncio.wrap_future(host.handle.stats.remote().future()) for host in self._open]
        if not asked:
            return []
        done, _ = await asyncio.wait(asked, timeout=POLL_TIMEOUT_S)
        return [future.result() for future in asked if future in done and future.exception() is None]

    def _host_of(self, key: str) -> RunningHost:
        """The emptiest of the group's hosts; a new one where they are full and may be more."""
        mine = [host for host in self._open if host.key == key]
        emptiest = min(mine, key=lambda host: len(host.trials), default=None)
        full = emptiest is None or len(emptiest.trials) >= self._study.hosts.num_slots
        if emptiest is None or (full and len(mine) < self._max_hosts):
            return self._start(key)
        return emptiest

    def _start(self, key: str, *, to_train: bool = True) -> RunningHost:
        import ray

        device = self._device
        self._count += 1
        label = f"host-{self._count}"
        handle = (
            ray.remote(HostActor)
            .options(
                num_cpus=device.cpus,
                num_gpus=device.gpus,
                max_restarts=-1,
                max_task_retries=0,
                max_concurrency=1000,
                runtime_env={"env_vars": cluster.worker_environment(device.threads, gpu=device.gpus > 0)},
            )
            .remote(self._study, self._groups[key], self._bank, device, label, folder=self._folder)
        )
        if to_train:
            handle.ready.remote()  # it loads from now on, not from the first trial that joins
        self._open.append(RunningHost(key, label, handle))
        return self._open[-1]

    def _release(self, trial_id: str) -> None:
        for host in self._open:
            if trial_id in host.trials:
                host.trials.discard(trial_id)
                host.empty_since = time.monotonic()

    def _stop_sweeping(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            for host in [h for h in self._open if not h.trials and time.monotonic() - h.empty_since > IDLE_S]:
                self._open.remove(host)
                await self._end(host)

    async def _end(self, host: RunningHost) -> None:
        """Give a host back. One that does not answer leaves its snapshots behind."""
        import ray

        closing = asyncio.wrap_future(host.handle.close.remote().future())
        await asyncio.wait([closing], timeout=CLOSE_TIMEOUT_S)
        ray.kill(host.handle)
