"""The host actor: a `training.fused.host.TrialHost` that trials of a study join and leave while it trains.

One loop owns the host (`_serve`): it gives members slots (`slots.py`), then trains them and makes reports
(`host_loop.py`). The methods that trials call only record a request and wait. A trial asks for its reports by number,
so that a repeated call is harmless. Whatever the scheduler does at report n (stop, pause, copy) starts from the
snapshot of report n.

Snapshots (`membership.py`) are in a folder of the node that outlives this process, so that a host that Ray restarts
continues its members from the reports that their drivers have. If Ray was killed, the next host removes its folders.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import itertools
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rankloom.config import StudyConfig, TrialConfig
from rankloom.errors import RankloomError, TrialError
from rankloom.hosts.host_loop import BankShape, HostDevice, HostLoop, HostReport, HostStats, describe_host, open_host
from rankloom.hosts.membership import Files, Membership, read_files
from rankloom.hosts.reports import TrialReport
from rankloom.hosts.slots import Candidate, assign_slots

SWEEP_EVERY_S = 1.0
SCRATCH = "rankloom-host-"
"""Prefix of the snapshots' folders, before the raylet's process id and the actor's id."""
MAX_BREAKDOWNS = 2
"""How often a host loads its base again after an error of its own, before it gives up."""


class HostActor:
    """An asyncio actor; see the module's docstring."""

    def __init__(
        self,
        study: StudyConfig,
        example: TrialConfig,
        bank: BankShape,
        device: HostDevice,
        label: str,
        scratch: Path | None = None,
        folder: Path | None = None,
    ) -> None:
        """
        Args:
            example: a trial with the base and the data that all members share.
            scratch: the folder for snapshots; None: this actor's own.
            folder: the study's folder, for the trials' origin; None: no origin is written or checked.
        """
        self._study, self._example = study, example
        self._bank, self._device, self._label, self._folder = bank, device, label, folder
        self._members: dict[str, Membership] = {}
        self._changed = asyncio.Event()
        self._reported = asyncio.Condition()
        self._serving: asyncio.Task[None] | None = None
        self._failure: RankloomError | None = None
        self._runner: HostLoop | None = None
        self._order = 0
        self._scratch = scratch or _make_scratch()
        self._work = HostStats()
        # one thread for all computing: a device library's handles, workspaces and plans belong to a thread
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rankloom-host")

    async def wait_until_ready(self) -> str:
        """Wait until the base is loaded; return the host's label.

        Raises:
            RankloomError: the data or the model can't be loaded.
        """
        if self._serving is None:
            self._serving = asyncio.create_task(self._run())
        async with self._reported:
            await self._reported.wait_for(lambda: self._runner is not None or self._failure is not None)
        if self._failure is not None:
            raise self._failure
        return self._label

    async def join(
        self, key: str, trial: TrialConfig, *, files: Files | None, n: int, recover: bool, best_folder: str | None
    ) -> bool:
        """Add a member; it trains when it gets a slot.

        Args:
            key: `<trial>#<nonce>`; this ends any other membership of the trial.
            files: the snapshot to start from; None: a fresh adapter.
            n: the number of the snapshot's report.
            recover: start from the snapshot of report n that this membership left here before the host died.
            best_folder: where its best adapter goes; None: the adapter is not kept.

        Returns:
            False where there is no snapshot to recover.

        Raises:
            RankloomError: the data or the model can't be loaded.
        """
        await self.wait_until_ready()
        member = Membership(
            Candidate(key, self._order, accepted=n, made=n), trial, self._scratch / key,
            Path(best_folder) if best_folder else None, heard_at=time.monotonic(),
        )  # fmt: skip
        self._order += 1
        for other in [m for m in self._members.values() if m.trial_id == member.trial_id and m.key != key]:
            await self.leave(other.key)
        if recover and n and not member.has(n):
            return False
        await asyncio.to_thread(lambda: member.keep(n) if recover else member.take(n, files))
        member.rewind()
        self._members[key] = member
        self._changed.set()
        return True

    async def advance(self, key: str, after: int) -> TrialReport:
        """Wait for the report after the `after`-th and return it.

        Raises:
            KeyError: there is no such member: its lease ended, or the host died and was restarted.
            RankloomError: the host failed.
        """
        member = self._members[key]
        member.num_callers += 1
        try:
            member.accept(after)
            self._changed.set()
            async with self._reported:
                await self._reported.wait_for(
                    lambda: after + 1 in member.reports or member.candidate.leaving or self._failure is not None
                )
        finally:
            member.num_callers -= 1
            member.heard_at = time.monotonic()
        if self._failure is not None:
            raise self._failure
        if after + 1 not in member.reports:
            raise KeyError(key)
        report = member.reports[after + 1]
        if report.best:
            await asyncio.to_thread(member.publish_best, after + 1)
        return report

    async def get_snapshot(self, key: str, n: int) -> Files:
        """Return the files that a member needs to continue from report n; empty for n = 0.

        Raises:
            KeyError: there is no such member, or no such snapshot.
        """
        member = self._members[key]
        if n and not member.has(n):
            raise KeyError(key)
        member.heard_at = time.monotonic()
        return await asyncio.to_thread(read_files, member.get_folder(n)) if n else {}

    async def leave(self, key: str) -> None:
        """End a membership; an unknown key does nothing."""
        member = self._members.get(key)
        if member is None:
            return
        member.candidate.leaving = True
        self._changed.set()
        async with self._reported:
            self._reported.notify_all()
        if not member.candidate.seated:
            self._forget(member)

    async def work(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """End the training, and call a function in this process, which has torch and a device."""
        await self.close()
        _free_memory()
        return await self._compute(function, *arguments)

    async def close(self) -> None:
        """End the training, and remove the host's files from the node."""
        if self._serving is not None:
            self._changed.set()  # the training returns after its current step
            self._serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._serving
        self._runner = None
        self._members.clear()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def get_stats(self) -> HostReport:
        """Return the host's counters and its members' current states."""
        candidates = [member.candidate for member in self._members.values()]
        run_ahead = self._study.hosts.run_ahead
        return HostReport(
            **copy.deepcopy(vars(self._work)),
            label=self._label,
            members=len(candidates),
            seated=sum(candidate.seated for candidate in candidates),
            training=sum(candidate.seated and candidate.wants(run_ahead) for candidate in candidates),
            waiting=sum(not candidate.seated and candidate.wants(run_ahead) for candidate in candidates),
            num_slots=self._num_slots,
            occupancy=self._work.filled / max(1, self._work.steps),
        )

    @property
    def _num_slots(self) -> int:
        return self._runner.host.num_slots if self._runner else self._bank.num_slots

    async def _run(self) -> None:
        for breakdowns in itertools.count():
            try:
                await self._serve()
            except RankloomError as error:
                self._failure = error
            except Exception as error:
                if breakdowns == MAX_BREAKDOWNS:
                    reason = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
                    self._failure = TrialError(f"{self._label} broke down {breakdowns + 1} times: {reason}")
                else:
                    traceback.print_exc()  # into the actor's log; the members continue from their last snapshots
                    _exit_if_device_is_lost(error)
                    self._runner = None
                    for member in self._members.values():
                        member.candidate.seated, member.candidate.at_report = False, True
                        member.rewind()
            if self._failure is not None:
                break
            await self._compute(_free_memory)
        async with self._reported:
            self._reported.notify_all()

    async def _serve(self) -> None:
        """Load the base, then train members until cancelled."""
        started = time.monotonic()
        runner = HostLoop(await self._compute(self._load), self._study, self._work)
        self._work.load_s = time.monotonic() - started
        async with self._reported:
            self._runner = runner
            self._reported.notify_all()
        while True:
            self._changed.clear()
            members = await self._assign_slots(runner)
            if members:
                due = await self._compute(runner.train, members, self._changed.is_set)
                await self._make_reports(runner, due)
            else:
                # not wait_for, which swallows a cancellation that arrives together with the event
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SWEEP_EVERY_S):
                        await self._changed.wait()

    async def _compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _load(self) -> Any:
        started = time.monotonic()
        import rankloom.training.fused.host  # noqa: F401  # time the import of torch apart

        self._work.import_s = time.monotonic() - started
        host = open_host(self._study, self._example, self._bank, self._device, self._folder)
        self._work.size = describe_host(host)
        return host

    async def _assign_slots(self, runner: HostLoop) -> list[Membership]:
        """Evict and admit members; return the members to train next."""
        now, lease_s = time.monotonic(), self._study.hosts.lease_s
        for member in self._members.values():
            if not member.num_callers and now - member.heard_at > lease_s:
                member.candidate.leaving = True  # its trial was killed, or paused with its own checkpoint
        plan = assign_slots([m.candidate for m in self._members.values()], self._num_slots, self._study.hosts.run_ahead)
        evict, admit, train = ([self._members[key] for key in keys] for keys in plan)
        if evict or admit:
            await self._compute(runner.move, evict, admit)
        for member in list(self._members.values()):
            if member.candidate.leaving and not member.candidate.seated:
                self._forget(member)
        await self._make_reports(runner, [member for member in admit if member.failure])
        return [member for member in train if not member.failure]

    async def _make_reports(self, runner: HostLoop, members: list[Membership]) -> None:
        if not members:
            return
        reports = await self._compute(runner.report, members)
        async with self._reported:
            for member, report in zip(members, reports, strict=True):
                member.reports[report.n] = report
                member.candidate.made, member.candidate.finished, member.candidate.at_report = (
                    report.n,
                    report.done,
                    True,
                )
            self._reported.notify_all()

    def _forget(self, member: Membership) -> None:
        self._members.pop(member.key, None)
        shutil.rmtree(member.folder, ignore_errors=True)


def _exit_if_device_is_lost(error: Exception) -> None:
    """End the process if the error made its device unusable; Ray restarts it, and the members rejoin."""
    from rankloom.models.device import is_lost

    if is_lost(error):
        os._exit(1)


def _free_memory() -> None:
    """Free a closed host's memory before another base is loaded: its bank and model are a reference cycle."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _make_scratch() -> Path:
    """Return this actor's folder on its node, which stays the same when Ray restarts the actor there."""
    import ray

    root, raylet = Path(tempfile.gettempdir()), os.getppid()
    sweep(root)
    folder = root / f"{SCRATCH}{raylet}-{ray.get_runtime_context().get_actor_id()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def sweep(root: Path) -> None:
    """Remove the folders of this user's hosts whose raylet has ended, since those hosts can't return."""
    for folder in root.glob(f"{SCRATCH}*-*"):
        raylet = folder.name.removeprefix(SCRATCH).partition("-")[0]
        with contextlib.suppress(OSError):  # another host was faster
            if raylet.isdigit() and folder.stat().st_uid == os.getuid() and not _runs(int(raylet)):
                shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True
