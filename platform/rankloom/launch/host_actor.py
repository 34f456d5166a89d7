"""The host actor: a `train.host.TrialHost` that trials of a study join and leave while it trains.

One runner loop owns the host: it seats members (`seats.py`), trains until a report is due or somebody comes or goes,
and makes the reports: validation, a snapshot, and the adapter where it is the best so far. The methods that trials call
only leave wishes and wait. A trial asks for its reports by number, so that asking twice does no harm, and whatever the
scheduler does at report n, stop, pause or copy, starts from the snapshot of report n.

Snapshots lie in a folder of the node that outlives this process, so that a host that Ray restarts goes on with its
members where their drivers are.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankloom.config import StudyConfig, TrialConfig, parse
from rankloom.errors import ConfigError, RankloomError, TrialError
from rankloom.launch.seats import Seat, decide

Files = dict[str, bytes]
Report = dict[str, Any]
"""n, step, percent, loss, accuracy, train_loss, tokens, train_s, best (so far), best_value, done, finished, error."""

META, BEST = "member.json", "best"
SWEEP_EVERY_S = 1.0
MAX_BREAKDOWNS = 2
"""Errors of a host's own, not of one member, after which it loads its base again."""
FAILED_LOSS = 1e9
"""The loss that a failed trial reports: worse than any, yet a number that every scheduler can compare."""


@dataclass
class Member:
    """A trial's membership: its seat, its reports that may still be asked for, and where their snapshots are."""

    seat: Seat
    trial: TrialConfig
    folder: Path
    best_folder: Path | None
    """Where the best adapter goes."""
    reports: dict[int, Report] = field(default_factory=dict)
    heard_at: float = 0.0
    num_callers: int = 0
    best_value: float | None = None
    evals_since_best: int = 0
    step: int = 0
    tokens: int = 0
    train_s: float = 0.0
    """Its share of the time that the host trained."""
    train_loss: float = 0.0
    failure: str | None = None

    @property
    def trial_id(self) -> str:
        return self.seat.key.partition("#")[0]

    def snapshot(self, n: int) -> Path:
        return self.folder / str(n)

    @property
    def start(self) -> Path | None:
        """The snapshot to be admitted from: of the last report; None at the very beginning."""
        last = self.snapshot(self.seat.made)
        return last if self.seat.made and (last / META).is_file() else None


class HostActor:
    """An asyncio actor; see the module's docstring."""

    def __init__(
        self,
        study: dict[str, Any],
        example: dict[str, Any],
        *,
        max_rank: int,
        with_magnitudes: bool,
        threads: int,
        label: str,
        scratch: Path | None = None,
    ) -> None:
        """
        Args:
            study: the study's tree, for `hosts` and `search`.
            example: a trial's tree, with the base and the data that all members share.
            with_magnitudes: whether members may be DoRA.
            threads: torch's, where the host computes on a CPU.
            scratch: the folder for snapshots; None: this actor's own.
        """
        self._study = parse(StudyConfig, study)
        self._example = parse(TrialConfig, example)
        self._max_rank, self._with_magnitudes = max_rank, with_magnitudes
        self._threads, self._label = threads, label
        self._members: dict[str, Member] = {}
        self._changed = asyncio.Event()
        self._reported = asyncio.Condition()
        self._runner: asyncio.Task[None] | None = None
        self._failure: RankloomError | None = None
        self._host: Any = None
        self._order = 0
        self._memory_bytes = 0
        self._scratch = scratch or _scratch()
        self._stats = {
            "steps": 0,
            "filled": 0.0,
            "tokens": 0,
            "train_s": 0.0,
            "eval_s": 0.0,
            "save_s": 0.0,
            "load_s": 0.0,
        }

    async def ready(self) -> str:
        """Wait until the base is loaded.

        Raises:
            RankloomError: the data or the model can't be loaded.
        """
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        async with self._reported:
            await self._reported.wait_for(lambda: self._host is not None or self._failure is not None)
        if self._failure is not None:
            raise self._failure
        return self._label

    async def join(
        self, key: str, tree: dict[str, Any], *, files: Files | None, n: int, recover: bool, best_folder: str | None
    ) -> bool:
        """Become a member; it is seated when its turn comes.

        Args:
            key: `<trial>#<nonce>`: another membership of the same trial is over with this.
            files: the snapshot to begin from; None: from the start.
            n: the number of the report that the snapshot was taken at.
            recover: take the snapshot of report n that this membership left here before the host died.

        Returns:
            False where there was nothing to recover.
        """
        await self.ready()
        folder = self._scratch / key
        member = Member(
            Seat(key, self._order, accepted=n, made=n), parse(TrialConfig, tree), folder,
            Path(best_folder) if best_folder else None, heard_at=time.monotonic(),
        )  # fmt: skip
        self._order += 1
        for other in [
            m.seat.key for m in self._members.values() if m.trial_id == member.trial_id and m.seat.key != key
        ]:
            await self.leave(other)
        if recover and n and not (member.snapshot(n) / META).is_file():
            return False
        if recover:  # what the dead host made ahead of the driver, perhaps half-written
            for later in folder.iterdir() if folder.is_dir() else ():
                if later != member.snapshot(n):
                    shutil.rmtree(later)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            if files:
                write_files(member.snapshot(n), files)
        _load_meta(member)
        self._members[key] = member
        self._changed.set()
        return True

    async def advance(self, key: str, after: int) -> Report:
        """The report after the `after`-th, as soon as it is made.

        Raises:
            KeyError: no such member: its lease ran out, or the host died and was restarted.
            TrialError: the host broke down.
        """
        member = self._members[key]
        member.num_callers += 1
        try:
            if after > member.seat.accepted:
                member.seat.accepted = after
                for n in [n for n in member.reports if n < after]:
                    del member.reports[n]
                    shutil.rmtree(member.snapshot(n), ignore_errors=True)
            self._changed.set()
            async with self._reported:
                await self._reported.wait_for(
                    lambda: after + 1 in member.reports or member.seat.leaving or self._failure is not None
                )
        finally:
            member.num_callers -= 1
            member.heard_at = time.monotonic()
        if self._failure is not None:
            raise self._failure
        if after + 1 not in member.reports:
            raise KeyError(key)
        report = member.reports[after + 1]
        if report["best"] and member.best_folder is not None:
            await asyncio.to_thread(_publish_best, member.snapshot(after + 1) / BEST, member.best_folder)
        return report

    async def snapshot(self, key: str, n: int) -> Files:
        """All that a membership needs to go on from report n; empty before the first."""
        member = self._members[key]
        member.heard_at = time.monotonic()
        return await asyncio.to_thread(read_files, member.snapshot(n)) if n else {}

    async def leave(self, key: str) -> None:
        """End a membership; who is no member has left."""
        member = self._members.get(key)
        if member is None:
            return
        member.seat.leaving = True
        self._changed.set()
        async with self._reported:
            self._reported.notify_all()
        if not member.seat.seated:
            self._forget(key)

    async def work(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The search is over: end the training, and call a function in this process, which has torch and a device."""
        if self._runner is not None:
            self._runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._runner
        self._host = None
        self._members.clear()
        gc.collect()
        return await asyncio.to_thread(function, *arguments)

    def stats(self) -> dict[str, Any]:
        """What the host did and does."""
        seats = [member.seat for member in self._members.values()]
        run_ahead = self._study.hosts.run_ahead
        return self._stats | {
            "label": self._label,
            "members": len(seats),
            "seated": sum(seat.seated for seat in seats),
            "training": sum(seat.seated and seat.wants(run_ahead) for seat in seats),
            "waiting": sum(not seat.seated and seat.wants(run_ahead) for seat in seats),
            "num_slots": self._study.hosts.num_slots,
            "occupancy": self._stats["filled"] / max(1, self._stats["steps"]),
            "memory_bytes": self._memory_bytes,
        }

    # the runner

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
                    traceback.print_exc()  # into the actor's log; the members go on from their last snapshots
                    self._host = None
                    for member in self._members.values():
                        member.seat.seated = False
                        _load_meta(member)
            if self._failure is not None:
                break
        async with self._reported:
            self._reported.notify_all()

    async def _serve(self) -> None:
        """Load the base and train for ever."""
        started = time.monotonic()
        host = await asyncio.to_thread(self._load)
        self._stats["load_s"] = time.monotonic() - started
        async with self._reported:
            self._host = host
            self._reported.notify_all()
        while True:
            self._changed.clear()
            train = await self._reseat()
            if train:
                due = await asyncio.to_thread(self._train, train)
                if due:
                    await self._make_reports(due)
            else:
                # not wait_for, which swallows a cancellation that comes together with the event
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SWEEP_EVERY_S):
                        await self._changed.wait()

    def _load(self) -> Any:
        """Read the data and load the base."""
        import torch

        from rankloom.data import load_data
        from rankloom.launch.trainer import local_device
        from rankloom.models import load_tokenizer
        from rankloom.train.host import TrialHost
        from rankloom.train.run import load_for, precision_of

        torch.set_num_threads(self._threads)
        trial, hosts = self._example, self._study.hosts
        device = local_device(trial.compute.device)
        data = load_data(trial.data, load_tokenizer(trial.model))
        if self._study.search.metric == "accuracy" and data.labels is None:
            raise ConfigError("search.metric: accuracy needs classification data (text, label); use loss")
        return TrialHost(
            load_for(trial, device),
            data,
            num_slots=hosts.num_slots,
            max_rank=self._max_rank,
            token_budget=hosts.token_budget,
            with_magnitudes=self._with_magnitudes,
            precision=precision_of(trial, device),
        )

    async def _reseat(self) -> list[str]:
        """Let members out and in; who trains next."""
        now, lease_s = time.monotonic(), self._study.hosts.lease_s
        for member in self._members.values():
            if not member.num_callers and now - member.heard_at > lease_s:
                member.seat.leaving = True  # its trial was killed, or is paused: it has its own checkpoint
        hosts = self._study.hosts
        seating = decide([m.seat for m in self._members.values()], hosts.num_slots, hosts.run_ahead)
        if seating.evict or seating.admit:
            await asyncio.to_thread(self._move, seating.evict, seating.admit)
        for key in [key for key, member in self._members.items() if member.seat.leaving and not member.seat.seated]:
            self._forget(key)
        failed = [key for key in seating.admit if self._members[key].failure]
        if failed:
            await self._make_reports(failed)
        return [key for key in seating.train if key not in failed]

    def _move(self, evict: Iterable[str], admit: Iterable[str]) -> None:
        for key in evict:
            self._host.evict(key)
            self._members[key].seat.seated = False
        for key in admit:
            member = self._members[key]
            try:
                self._host.admit(key, member.trial, member.start)
                member.seat.seated = True
            except RankloomError as error:  # this trial can't be a member; the others go on
                member.failure = str(error)

    def _train(self, names: list[str]) -> list[str]:
        """Train until a report is due or somebody comes or goes; whose report is due."""
        slots = self._study.hosts.num_slots
        while True:
            started = time.monotonic()
            reports = self._host.step()
            seconds = time.monotonic() - started
            self._stats["steps"] += 1
            self._stats["filled"] += len(names) / slots
            self._stats["train_s"] += seconds
            due = []
            for name in names:
                self._members[name].train_s += seconds / len(names)
            for report in reports:
                member = self._members[report.name]
                self._stats["tokens"] += report.tokens - member.tokens
                member.tokens, member.train_loss, member.step = report.tokens, report.loss, report.step
                member.failure = report.error
                if report.error or report.done or report.step % member.trial.eval.every == 0:
                    due.append(report.name)
            if due or self._changed.is_set():
                return due

    async def _make_reports(self, names: list[str]) -> None:
        reports = await asyncio.to_thread(lambda: {key: self._report(key) for key in names})
        async with self._reported:
            for key, report in reports.items():
                member = self._members[key]
                member.reports[report["n"]] = report
                member.seat.made, member.seat.finished = report["n"], report["done"]
            self._reported.notify_all()

    def _report(self, key: str) -> Report:
        """Validate, and keep what it takes to go on from here."""
        from rankloom.train.memory import peak_memory_bytes

        member = self._members[key]
        n = member.seat.made + 1
        if member.failure is not None:
            member.seat.seated = False  # the host let it go
            return failed(n, member.failure, _progress(member, 0))
        started = time.monotonic()
        self._memory_bytes = peak_memory_bytes(self._host.base.device)
        try:
            scores = self._host.evaluate([key])[key]
        except TrialError as error:
            return failed(n, str(error), _progress(member, 0))
        value = scores.loss if self._study.search.metric == "loss" else scores.accuracy
        sign = 1 if self._study.search.best == "max" else -1
        best = member.best_value is None or sign * value > sign * member.best_value
        member.best_value = value if best else member.best_value
        member.evals_since_best = 0 if best else member.evals_since_best + 1
        evaluated = time.monotonic()
        num_steps, patience = self._host.members[key].num_steps, member.trial.eval.patience
        done = member.step >= num_steps or (patience is not None and member.evals_since_best >= patience)
        report = _progress(member, num_steps) | {
            "n": n,
            "loss": scores.loss,
            "accuracy": scores.accuracy,
            "best": best,
            "best_value": member.best_value,
            "done": done,
            "finished": done,  # `done` is also what Tune sets when it stops a trial
            "error": None,
        }
        folder = member.snapshot(n)
        folder.mkdir(parents=True)
        self._host.save(key, folder)
        if best and member.best_folder is not None:
            (folder / BEST).mkdir()
            self._host.export(key, folder / BEST)
        _save_meta(member, folder)
        self._stats["eval_s"] += evaluated - started
        self._stats["save_s"] += time.monotonic() - evaluated
        return report

    def _forget(self, key: str) -> None:
        member = self._members.pop(key, None)
        if member is not None:
            shutil.rmtree(member.folder, ignore_errors=True)


def failed(n: int, reason: str, progress: Report) -> Report:
    """The last report of a trial that failed: the worst values that a scheduler can compare."""
    return progress | {
        "n": n,
        "loss": FAILED_LOSS,
        "accuracy": 0.0,
        "best": False,
        "best_value": None,
        "done": True,
        "finished": False,
        "error": reason,
    }


def read_files(folder: Path) -> Files:
    """A snapshot as bytes, without the adapter that goes its own way."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder).parts[0] != BEST
    }


def write_files(folder: Path, files: Files) -> None:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def _progress(member: Member, num_steps: int) -> Report:
    return {
        "step": member.step,
        "percent": 100 * min(1.0, member.step / num_steps) if num_steps else 100.0,
        "train_loss": member.train_loss,
        "tokens": member.tokens,
        "train_s": member.train_s,
    }


_META: dict[str, Any] = {
    "best_value": None,
    "evals_since_best": 0,
    "step": 0,
    "tokens": 0,
    "train_s": 0.0,
    "train_loss": 0.0,
}
"""What of a member is not the host's to save, as it is at the start."""


def _save_meta(member: Member, folder: Path) -> None:
    meta = {name: getattr(member, name) for name in _META} | {"trial": member.trial_id}
    (folder / META).write_text(json.dumps(meta))  # last: a snapshot without it is half-written


def _load_meta(member: Member) -> None:
    """Be where the last snapshot is."""
    meta = dict(_META)
    if member.start is not None:
        meta = json.loads((member.start / META).read_text())
        if meta.pop("trial") != member.trial_id:
            meta |= {"best_value": None, "evals_since_best": 0}  # another's weights: no adapter of them is kept yet
    for name, value in meta.items():
        setattr(member, name, value)


def _publish_best(source: Path, target: Path) -> None:
    """Put an adapter in the place of an earlier one. A reader may find none for a moment, never a half."""
    if not source.is_dir():
        return  # asked for twice
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=".staged-"))
    shutil.copytree(source, staged, dirs_exist_ok=True)
    staged.chmod(0o755)
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    shutil.rmtree(source)


def _scratch() -> Path:
    """This actor's folder on its node: the same again after Ray restarted it there."""
    import ray

    actor = ray.get_runtime_context().get_actor_id()
    folder = Path(tempfile.gettempdir()) / f"rankloom-host-{actor}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
