"""Hosts of a study: a group per base and data set, with one host per device, started on demand.

Trials ask the actor `Hosts` for a host. It spreads them by load, starts another host of a group when the running ones
are full and a device is left, and ends a host that has had no trial for a while.
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
from rankloom.config.study import is_fusable, make_host_key
from rankloom.errors import ConfigError
from rankloom.hosts.host_actor import HostActor
from rankloom.hosts.host_loop import BankShape, HostDevice, HostReport
from rankloom.launch import cluster
from rankloom.launch.orphans import remove_orphaned_groups

IDLE_S = 30.0
"""Seconds without a trial after which a host ends."""
SWEEP_EVERY_S = 5.0
POLL_TIMEOUT_S = 0.5
CLOSE_TIMEOUT_S = 3.0


def group_trials(study: StudyConfig) -> dict[str, TrialConfig]:
    """Return `make_host_key` -> a trial with that key. Trials with one key can share a base and data set."""
    found: dict[str, TrialConfig] = {}
    for trial in study.probe_trials():
        if is_fusable(trial):
            found.setdefault(make_host_key(trial), trial)
    return found


def size_bank(study: StudyConfig, num_slots: int) -> BankShape:
    """Return slots of the ranks in the search space (a range counts by its ends), and for DoRA if the space has it."""
    fusable = [trial for trial in study.probe_trials() if is_fusable(trial)]
    ranks = {int(trial.method.rank) for trial in fusable} or {1}  # type: ignore[union-attr]
    if study.hosts.max_rank:
        ranks = {min(rank, study.hosts.max_rank) for rank in (*ranks, study.hosts.max_rank)}
    return BankShape(tuple(sorted(ranks)), any(trial.method.type == "dora" for trial in fusable), num_slots)


@dataclass(frozen=True)
class HostPlan:
    """A study's division of a cluster."""

    hosts_per_group: int
    """Most hosts of a group."""
    num_slots: int
    """Slots of a host."""
    device: HostDevice
    dedicated_cpus: int
    """Cores per worker of a trial that can't share a base."""


def share_out(study: StudyConfig, nodes: Sequence[dict[str, float]]) -> HostPlan:
    """Divide the cluster: all groups share each device; on CPUs, dedicated runs together count as one more group.

    On CPUs a node is a device. On GPUs a dedicated run waits until a host ends and frees its device.

    Args:
        nodes: each node's resources.

    Raises:
        ConfigError: compute.device is cuda, but the cluster has no GPU.
    """
    compute = study.baseline.compute
    num_groups = len(group_trials(study))
    parts = max(1, num_groups + any(not is_fusable(trial) for trial in study.probe_trials()))
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if compute.device == "cuda" and not gpus:
        raise ConfigError("compute.device=cuda: this cluster has no GPU; set trial.compute.device=cpu, or auto")
    on_gpu = gpus > 0 and compute.device != "cpu"
    sizes = [node.get("CPU", 0.0) for node in nodes]
    # the core count that uses the most cores over all nodes with at least as many; smaller nodes get no host
    cores = max(1.0, max(sizes, key=lambda size: (size * sum(other >= size for other in sizes), size)))
    large = [node for node in nodes if node.get("CPU", 0.0) >= cores] or list(nodes)
    num_devices = gpus if on_gpu else len(large)
    num_hosts = study.hosts.max_hosts or num_devices
    shared_by = parts * -(-num_hosts // len(large))
    cpus = cluster.OF_THE_CORES * cores / shared_by
    threads = compute.cpus_per_worker or max(1, int(cores / shared_by))
    memory = min(node.get("memory", math.inf) for node in large) / shared_by
    gpu = int(1e4 * min(1.0, gpus / num_hosts) / max(1, num_groups)) / 1e4 if on_gpu else 0.0
    device = HostDevice(min(cpus, 1.0) if on_gpu else cpus, gpu, threads, memory)
    trials_per_host = math.ceil(study.num_trials / (num_hosts * max(1, num_groups)))
    num_slots = study.hosts.count_slots(trials_per_host, on_gpu=on_gpu)
    return HostPlan(num_hosts, num_slots, device, max(1, int(cores / parts)))


@dataclass
class RunningHost:
    """A host with its actor and its trials."""

    key: str
    label: str
    handle: Any
    trials: set[str] = field(default_factory=set)
    empty_since: float = math.inf
    """Monotonic time since when it has no trial; infinite before its first trial."""


class Hosts:
    """The actor that assigns trials to hosts; all its methods return quickly."""

    def __init__(self, study: StudyConfig, nodes: Sequence[dict[str, float]], folder: Path | None = None) -> None:
        """
        Args:
            nodes: each node's resources.
            folder: the study's folder, where hosts write the trials' origin; None: they do not.
        """
        self._study, self._folder = study, folder
        self._groups = group_trials(study)
        plan = share_out(study, nodes)
        self._bank = size_bank(study, plan.num_slots)
        self._max_hosts, self._device = plan.hosts_per_group, plan.device
        self._open: list[RunningHost] = []
        self._count = 0
        self._sweeper: asyncio.Task[None] | None = None

    async def prepare(self) -> list[Any]:
        """Start hosts of each group, so that their bases load while the first trials start; return their handles."""
        self._sweeper = self._sweeper or asyncio.create_task(self._sweep())
        trials = self._study.num_trials / max(1, len(self._groups))
        num_hosts = min(self._max_hosts, math.ceil(trials / self._bank.num_slots))
        return [self._start(key).handle for key in self._groups for _ in range(num_hosts)]

    async def assign(self, trial_id: str, trial: TrialConfig) -> Any:
        """Assign a trial to a host and return the host's handle."""
        self._release(trial_id)
        key = make_host_key(trial)
        self._groups.setdefault(key, trial)
        host = self._find_host(key)
        host.trials.add(trial_id)
        return host.handle

    async def choose(self, trials: Sequence[TrialConfig]) -> list[Any]:
        """Return, for each trial, the handle of a host to call `work` on: of its own group, as far as hosts fit.

        Call it after the search: hosts no longer end for lack of trials, since those that work have none.
        """
        self._stop_sweeping()
        affordable = max(1, len(self._groups))
        for trial in trials:
            key = make_host_key(trial)
            if len(self._open) < affordable and all(host.key != key for host in self._open):
                self._groups.setdefault(key, trial)
                self._start(key, to_train=False)
        handles = {host.key: host.handle for host in self._open}
        return [handles.get(make_host_key(trial), self._open[0].handle) for trial in trials]

    async def release(self, trial_id: str) -> None:
        """Record that a trial left its host."""
        self._release(trial_id)

    async def drop_lost(self, trial_id: str) -> None:
        """Drop a trial's host, which died for good, and divide the cluster again, which may have shrunk.

        The host's trials ask for another host.
        """
        import ray

        for host in [host for host in self._open if trial_id in host.trials]:
            self._open.remove(host)
            ray.kill(host.handle)
            self._max_hosts = share_out(self._study, cluster.list_alive_nodes()).hosts_per_group

    async def close(self) -> None:
        """End all hosts, and free what killed trials had reserved."""
        self._stop_sweeping()
        await asyncio.gather(*map(self._end, self._open))
        remove_orphaned_groups()

    async def get_stats(self) -> list[HostReport]:
        """Return the `get_stats` of each host that answers; a host that loads or is down does not."""
        asked = [asyncio.wrap_future(host.handle.get_stats.remote().future()) for host in self._open]
        if not asked:
            return []
        done, _ = await asyncio.wait(asked, timeout=POLL_TIMEOUT_S)
        return [future.result() for future in asked if future in done and future.exception() is None]

    def _find_host(self, key: str) -> RunningHost:
        """Return the group's host with the fewest trials; start one where all are full and a device is left."""
        mine = [host for host in self._open if host.key == key]
        emptiest = min(mine, key=lambda host: len(host.trials), default=None)
        full = emptiest is None or len(emptiest.trials) >= self._bank.num_slots
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
                runtime_env={"env_vars": cluster.make_worker_environment(device.threads, gpu=device.gpus > 0)},
            )
            .remote(self._study, self._groups[key], self._bank, device, label, folder=self._folder)
        )
        if to_train:
            handle.wait_until_ready.remote()  # load now, before the first trial joins
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
            remove_orphaned_groups()  # hosts and trials wait for what they reserve
            await asyncio.sleep(SWEEP_EVERY_S)
            for host in [h for h in self._open if not h.trials and time.monotonic() - h.empty_since > IDLE_S]:
                self._open.remove(host)
                await self._end(host)

    async def _end(self, host: RunningHost) -> None:
        """End a host. One that does not answer leaves its snapshots behind."""
        import ray

        closing = asyncio.wrap_future(host.handle.close.remote().future())
        await asyncio.wait([closing], timeout=CLOSE_TIMEOUT_S)
        ray.kill(host.handle)
