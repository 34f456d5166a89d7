"""The host actor around a host that only counts: reports by number, running ahead, snapshots, failures, leases."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import os
import shutil
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Collection, Coroutine
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rankloom.config import StudyConfig, TrialConfig, dump, parse
from rankloom.errors import DataError, IncompatibleError, RankloomError, TrialError
from rankloom.hosts.host_actor import HostActor, sweep
from rankloom.hosts.host_loop import BankShape, HostDevice
from rankloom.hosts.membership import META
from rankloom.hosts.reports import TrialReport
from rankloom.training.fused.host import StepReport
from rankloom.training.memory import read_peak_memory_bytes

STUDY = {
    "name": "s",
    "trial": {"budget": {"steps": 12}, "eval": {"every": 3}},
    "space": [{"seed": {"randint": [0, 99]}}],
    "hosts": {"num_slots": 2, "run_ahead": 1, "lease_s": 60},
}


class CountingHost:
    """A host whose members' weights are their number of steps; as `train.host.TrialHost` from outside."""

    base = SimpleNamespace(device=torch.device("cpu"))
    num_slots = 2

    def __init__(self) -> None:
        self.members: dict[str, Any] = {}
        self.most = 0

    def admit(self, name: str, trial: TrialConfig, checkpoint: Path | None = None) -> None:
        assert len(self.members) < 2
        if trial.seed == 13:
            raise IncompatibleError(f"{name}: rank too large")
        step = int((checkpoint / "step").read_text()) if checkpoint else 0
        slot = next(k for k in range(2) if k not in {each.slot for each in self.members.values()})
        self.members[name] = SimpleNamespace(step=step, slot=slot, num_steps=trial.budget.steps, seed=trial.seed)

    def evict(self, name: str) -> None:
        del self.members[name]

    def step(self, names: Collection[str]) -> list[StepReport]:
        time.sleep(0.002)
        self.most = max(self.most, len(self.members))
        reports = []
        for name in names:
            member = self.members[name]
            assert member.step < member.num_steps
            member.step += 1
            report = StepReport(name, member.step, 1 / member.step, 10 * member.step, member.step == member.num_steps)
            if member.seed == 7 and member.step == 5:
                del self.members[name]
                report = replace(report, error="training diverged at step 5")
            reports.append(report)
        return reports

    def evaluate(self, names: list[str]) -> dict[str, Any]:
        losses = {name: 1 / self.members[name].step for name in names}
        losses |= {name: math.nan for name in names if (self.members[name].seed, self.members[name].step) == (11, 6)}
        return {name: SimpleNamespace(loss=loss, accuracy=None, metric=None) for name, loss in losses.items()}

    def snapshot(self, name: str) -> Any:
        step = str(self.members[name].step)
        return SimpleNamespace(step=step, write=lambda folder: (folder / "step").write_text(step))

    def export(self, name: str, folder: Path, snapshot: Any) -> None:
        assert snapshot.step == str(self.members[name].step)
        (folder / "adapter").write_text(snapshot.step)


class CountingActor(HostActor):
    def _load(self) -> Any:
        return CountingHost()


class BrokenHost(CountingHost):
    def evaluate(self, names: list[str]) -> dict[str, Any]:
        if self.members[names[0]].step > 3:
            raise TypeError("a bug")
        return super().evaluate(names)


class BrokenActor(HostActor):
    def _load(self) -> Any:
        return BrokenHost()


class LostHost(CountingHost):
    error: Exception

    def step(self, names: Collection[str]) -> list[StepReport]:
        raise self.error


class LostActor(HostActor):
    def _load(self) -> Any:
        return LostHost()


class HeldByItselfActor(HostActor):
    """Loads hosts that only a collection frees; the first one breaks down."""

    loaded: weakref.ref[CountingHost] | None = None

    def _load(self) -> Any:
        host = CountingHost()
        if self.loaded is None:
            host.evaluate = None  # type: ignore[assignment,method-assign]
        else:
            assert self.loaded() is None, "the host before is still there"
        host.itself = host  # type: ignore[attr-defined]
        self.loaded = weakref.ref(host)
        return host


class OneThreadHost(CountingHost):
    def __init__(self) -> None:
        super().__init__()
        self.threads = {threading.get_ident()}

    def admit(self, name: str, trial: TrialConfig, checkpoint: Path | None = None) -> None:
        self.threads.add(threading.get_ident())
        super().admit(name, trial, checkpoint)

    def step(self, names: Collection[str]) -> list[StepReport]:
        self.threads.add(threading.get_ident())
        return super().step(names)

    def evaluate(self, names: list[str]) -> dict[str, Any]:
        self.threads.add(threading.get_ident())
        return super().evaluate(names)


class OneThreadActor(HostActor):
    def _load(self) -> Any:
        return OneThreadHost()


class NoData(HostActor):
    def _load(self) -> Any:
        raise DataError("train: no such file")


def study(**hosts: Any) -> StudyConfig:
    return parse(StudyConfig, STUDY | {"hosts": STUDY["hosts"] | hosts})  # type: ignore[operator]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., HostActor]:
    def made(cls: type[HostActor] = CountingActor, **hosts: Any) -> HostActor:
        config = study(**hosts)
        return cls(
            config, config.baseline, BankShape((8,), False, config.hosts.num_slots), HostDevice(1.0, 0.0, 1, 1e12),
            label="host-1", scratch=tmp_path / "scratch",
        )  # fmt: skip

    return made


def trial(seed: int) -> TrialConfig:
    return study().resolve({"branch": 0, "seed": seed})


def join(actor: HostActor, key: str, seed: int = 0, **changed: Any) -> Coroutine[Any, Any, bool]:
    defaults: dict[str, Any] = {"files": None, "n": 0, "recover": False, "best_folder": None}
    return actor.join(key, trial(seed), **defaults | changed)


async def whole(actor: HostActor, key: str) -> list[TrialReport]:
    """All reports of a member that joined."""
    reports: list[TrialReport] = []
    while not reports or not reports[-1].done:
        reports.append(await actor.advance(key, len(reports)))
    await actor.leave(key)
    return reports


def test_one_thread_computes_whatever_else_goes_on(make: Callable[..., HostActor]) -> None:
    async def main() -> set[int]:
        actor = make(OneThreadActor)
        await asyncio.gather(*(join(actor, f"t{i}#a") for i in range(6)))
        await asyncio.gather(*(whole(actor, f"t{i}#a") for i in range(6)))
        return actor._runner.host.threads | {await actor.work(threading.get_ident)}  # type: ignore[union-attr, attr-defined]

    threads = asyncio.run(main())
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


def test_six_members_share_two_slots_and_each_gets_all_its_reports(make: Callable[..., HostActor]) -> None:
    async def main() -> tuple[list[list[TrialReport]], dict[str, Any], Any]:
        actor = make()
        await asyncio.gather(*(join(actor, f"t{i}#a") for i in range(6)))
        reports = await asyncio.gather(*(whole(actor, f"t{i}#a") for i in range(6)))
        while actor.get_stats().members:
            await asyncio.sleep(0.01)
        return reports, actor.get_stats(), actor._runner.host

    found, stats, host = asyncio.run(main())
    for reports in found:
        assert [r.n for r in reports] == [1, 2, 3, 4]
        assert [r.step for r in reports] == [3, 6, 9, 12]
        assert [r.percent for r in reports] == [25, 50, 75, 100]
        assert [r.done for r in reports] == [False, False, False, True]
        assert [r.loss for r in reports] == [1 / 3, 1 / 6, 1 / 9, 1 / 12]
    assert host.most == 2
    assert not host.members
    seats = stats.seats
    assert {seat.trial for seat in seats} == {f"t{i}" for i in range(6)}
    assert {seat.slot for seat in seats} == {0, 1}
    for slot in (0, 1):  # one after the other, and all have left
        mine = [seat for seat in seats if seat.slot == slot]
        assert all(one.start <= (one.end or 0) <= other.start for one, other in pairwise(mine))
        assert mine[-1].end is not None
    assert stats.tokens == 6 * 120
    assert stats.occupancy > 0.85
    assert stats.members == 0


def test_a_member_runs_ahead_only_to_its_bound_and_its_snapshot_is_of_the_report_told(
    make: Callable[..., HostActor],
) -> None:
    async def main() -> None:
        actor = make(run_ahead=1)
        await join(actor, "t#a")
        first = await actor.advance("t#a", 0)
        await asyncio.sleep(0.3)
        assert actor._members["t#a"].candidate.made == 2  # one more than was told
        assert (await actor.get_snapshot("t#a", first.n))["step"] == b"3"
        assert (await actor.advance("t#a", 0)).step == 3  # asked twice, answered twice
        second = await actor.advance("t#a", 1)
        await asyncio.sleep(0.3)
        files = await actor.get_snapshot("t#a", second.n)
        assert files["step"] == b"6"
        assert await actor.get_snapshot("t#a", 0) == {}
        with pytest.raises(KeyError):  # there is none: an empty one would be taken for the beginning
            await actor.get_snapshot("t#a", 9)
        # another trial takes its place over, as population based training does
        await join(actor, "u#a", files=files, n=2)
        third = await actor.advance("u#a", 2)
        assert (third.n, third.step, third.best) == (3, 9, True)

    asyncio.run(main())


def test_a_trial_that_diverges_or_does_not_fit_ends_with_its_reason_alone(make: Callable[..., HostActor]) -> None:
    async def main() -> None:
        actor = make()
        await asyncio.gather(
            join(actor, "bad#a", 7), join(actor, "wide#a", 13), join(actor, "nan#a", 11), join(actor, "good#a")
        )
        bad, wide, nan, good = await asyncio.gather(
            *(whole(actor, f"{key}#a") for key in ("bad", "wide", "nan", "good"))
        )
        assert [(r.step, r.loss) for r in nan] == [(3, 1 / 3), (6, 1e9)]
        assert nan[-1].error == "the validation loss is not finite at step 6; lower optim.learning_rate (0.0003)"
        assert [(r.step, r.error) for r in bad] == [(3, None), (5, "training diverged at step 5")]
        assert (bad[-1].loss, bad[-1].accuracy, bad[-1].finished) == (1e9, 0.0, False)
        assert [r.error for r in wide] == ["rank too large"]
        assert [r.step for r in good] == [3, 6, 9, 12]

    asyncio.run(main())


def test_only_the_best_adapter_that_was_told_is_kept(make: Callable[..., HostActor], tmp_path: Path) -> None:
    async def main() -> None:
        actor = make()
        best = tmp_path / "adapters" / "t"
        await join(actor, "t#a", best_folder=str(best))
        await actor.advance("t#a", 0)
        await asyncio.sleep(0.3)
        assert (best / "adapter").read_text() == "3"
        await actor.advance("t#a", 1)
        assert (best / "adapter").read_text() == "6"
        assert [p.name for p in best.parent.iterdir()] == ["t"]

    asyncio.run(main())


def test_a_restarted_host_goes_on_where_the_driver_is(make: Callable[..., HostActor]) -> None:
    async def before() -> None:
        actor = make()
        await join(actor, "t#a")
        for after in range(2):
            await actor.advance("t#a", after)
        await asyncio.sleep(0.2)

    async def after() -> list[int]:
        actor = make()  # the same scratch folder
        with pytest.raises(KeyError):
            await actor.advance("t#a", 2)
        assert not await join(actor, "unknown#a", n=1, recover=True)
        assert await join(actor, "t#a", n=2, recover=True)
        return [(await actor.advance("t#a", n)).step for n in (2, 3)]

    asyncio.run(before())
    assert asyncio.run(after()) == [9, 12]


def test_a_member_that_nobody_asks_for_loses_its_place(make: Callable[..., HostActor], tmp_path: Path) -> None:
    async def main() -> None:
        actor = make(lease_s=0.3)
        await join(actor, "dead#a")
        await actor.advance("dead#a", 0)
        await asyncio.sleep(2)
        assert actor.get_stats().members == 0
        assert not list((tmp_path / "scratch").iterdir())
        with pytest.raises(KeyError):
            await actor.advance("dead#a", 1)

    asyncio.run(main())


def test_a_new_membership_ends_the_trials_old_one(make: Callable[..., HostActor]) -> None:
    async def main() -> None:
        actor = make()
        await join(actor, "t#old")
        parked = asyncio.create_task(actor.advance("t#old", 4))
        await asyncio.sleep(0.05)
        await join(actor, "t#new")
        with pytest.raises(KeyError):
            await parked
        await actor.leave("t#old")  # late, from a cached actor: it must not end the new one
        assert (await actor.advance("t#new", 0)).step == 3

    asyncio.run(main())


def test_patience_ends_a_trial_and_survives_a_snapshot(make: Callable[..., HostActor]) -> None:
    async def main() -> None:
        actor = make()
        tree = dump(trial(0))
        tree["eval"]["patience"] = 2
        files = {"step": b"3", META: json.dumps(_meta(best_value=0.01, evals_since_best=1)).encode()}
        await actor.join("t#a", parse(TrialConfig, tree), files=files, n=1, recover=False, best_folder=None)
        report = await actor.advance("t#a", 1)
        assert (report.best, report.done, report.finished) == (False, True, True)

    asyncio.run(main())


def _meta(**changed: Any) -> dict[str, Any]:
    meta = {"trial": "t", "best_value": None, "evals_since_best": 0, "step": 3, "tokens": 30, "train_s": 0.1}
    return meta | {"train_loss": 1.0} | changed


def test_what_all_trials_would_fail_of_reaches_all(make: Callable[..., HostActor]) -> None:
    async def main() -> None:
        actor = make(NoData)
        with pytest.raises(DataError, match="no such file"):
            await join(actor, "t#a")

    asyncio.run(main())


def test_a_host_that_breaks_down_loads_again_and_its_members_notice_nothing(make: Callable[..., HostActor]) -> None:
    async def main() -> None:
        actor = make()
        await join(actor, "t#a")
        await actor.advance("t#a", 0)
        actor._runner.host.evaluate = None  # as a bug or a lost device would
        reports = [await actor.advance("t#a", after) for after in range(1, 4)]
        assert [r.step for r in reports] == [6, 9, 12]
        assert [r.tokens for r in reports] == [60, 90, 120]

    asyncio.run(main())


def test_a_host_that_breaks_down_again_and_again_says_so(make: Callable[..., HostActor]) -> None:
    async def main() -> None:
        actor = make(BrokenActor)
        await join(actor, "t#a")
        await actor.advance("t#a", 0)
        with pytest.raises(TrialError, match="host-1 broke down 3 times: TypeError: a bug"):
            await whole(actor, "t#a")

    asyncio.run(main())


def test_a_full_disk_is_no_trials_failure(make: Callable[..., HostActor], tmp_path: Path) -> None:
    async def main() -> None:
        actor = make()
        await join(actor, "t#a")
        await actor.advance("t#a", 0)
        shutil.rmtree(tmp_path / "scratch")
        (tmp_path / "scratch").write_text("the disk is gone")
        with pytest.raises(
            RankloomError, match=r"a host can't write its trials' snapshots: .*Not a directory.*; make"
        ) as caught:
            await whole(actor, "t#a")
        assert not isinstance(caught.value, TrialError)  # which would end the trials one after another

    asyncio.run(main())


def test_a_host_that_is_given_back_leaves_nothing_behind(make: Callable[..., HostActor], tmp_path: Path) -> None:
    async def main() -> None:
        actor = make()
        await join(actor, "t#a")
        await actor.advance("t#a", 0)
        assert list((tmp_path / "scratch").iterdir())
        await actor.close()
        assert not (tmp_path / "scratch").exists()

    asyncio.run(main())


def test_folders_of_a_ray_that_is_gone_are_swept(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    left, used, strange = (tmp_path / f"rankloom-host-{name}" for name in (f"{gone.pid}-a", f"{os.getpid()}-b", "x-c"))
    for folder in (left, used, strange):
        (folder / "t#a" / "1").mkdir(parents=True)
    sweep(tmp_path)
    assert not left.exists()
    assert used.exists()
    assert strange.exists()


def test_a_host_that_loads_again_has_let_go_of_what_it_had(make: Callable[..., HostActor]) -> None:
    async def main() -> None:
        actor = make(HeldByItselfActor)
        await join(actor, "t#a")
        assert [r.step for r in await whole(actor, "t#a")] == [3, 6, 9, 12]

    gc.collect()
    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    ],
)
def test_a_host_whose_device_is_lost_ends_its_process(
    make: Callable[..., HostActor], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(LostHost, "error", error, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)

    async def main() -> None:
        actor = make(LostActor)
        await join(actor, "t#a")
        await whole(actor, "t#a")

    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            asyncio.run(main())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_rank_that_there_is_no_memory_for_is_refused_and_the_others_train(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"row {i},{'ab'[i % 2]}\n" for i in range(40)))
    config = parse(
        StudyConfig,
        {
            "name": "s",
            "trial": {
                "model": {"id": str(tiny_llama)},
                "data": {"train": str(tmp_path / "rows.csv")},
                "budget": {"steps": 4},
                "eval": {"every": 2},
                "compute": {"device": "cpu"},
            },
            "space": [{"method": {"type": "lora", "rank": {"choice": [4, 4096]}}}],
        },
    )

    def actor(memory_bytes: float) -> HostActor:
        return HostActor(
            config, config.baseline, BankShape((4, 4096), with_magnitudes=False, num_slots=8),
            HostDevice(1.0, 0.0, 1, memory_bytes), label="host-1", scratch=tmp_path / "scratch",
        )  # fmt: skip

    assert actor(1e12)._load().max_rank == 4096
    device = torch.device("cpu")

    async def main() -> None:
        small = actor(read_peak_memory_bytes(device) + 150e6)  # a slot of rank 4096 takes 200 MB

        async def reports(rank: int) -> list[dict[str, Any]]:
            member = config.resolve({"branch": 0, "method.rank": rank})
            await small.join(f"{rank}#a", member, files=None, n=0, recover=False, best_folder=None)
            return await whole(small, f"{rank}#a")

        wide, narrow = await asyncio.gather(reports(4096), reports(4))
        [refused] = [r.error for r in wide]
        assert refused == "method.rank=4096 does not fit this host; allowed: at most the bank's 4"
        assert [r.step for r in narrow] == [2, 4]
        nothing = actor(read_peak_memory_bytes(device) + 1e4)
        with pytest.raises(TrialError, match=r"not even one slot of rank 4 .* lower data\.max_length or method\.rank"):
            await nothing.wait_until_ready()

    asyncio.run(main())
