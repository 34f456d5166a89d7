"""The sections of `gpu.py` that train: a host's members against PEFT's trials, against the bare base, and a study."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from gpu_baselines import DTYPE, NUM_PROCESSES, PeftTrial, graphed, mps, processes_at_once
from gpu_bench import Bench
from random_models import random_base, random_data, random_trial
from torch import Tensor, nn

from rankloom.banks.bank import AdapterBank
from rankloom.config import StudyConfig, TrialConfig, parse
from rankloom.data import TaskData, load_data
from rankloom.errors import ModelError
from rankloom.hosts.host_loop import HostLoop, HostStats
from rankloom.hosts.membership import Membership
from rankloom.hosts.slots import Candidate
from rankloom.kernels.graphs import GraphCache
from rankloom.models import Base, load_base
from rankloom.training.fused.attention import use_packed_attention
from rankloom.training.fused.forward import FusedForward
from rankloom.training.fused.host import TrialHost
from rankloom.training.fused.packing import Example, pack
from rankloom.training.loop import TrainingLoop
from rankloom.training.precision import autocast
from rankloom.training.session import LocalSession

MIXED_RANKS = (4, 8, 16, 64)
BARE_TOKENS, BARE_LENGTH = 8192, 170
MEMBER_BATCH = 3
"""Rows of `BARE_LENGTH` of each of 16 members: as many tokens as the bare base gets."""


def lengths(bench: Bench, shortest: int, longest: int) -> TaskData:
    return random_data(5, 12) if bench.dry else random_data(shortest, longest)


@contextmanager
def host_on(
    base: Base, data: TaskData, num: int, batch_size: int, *, ranks: Sequence[int] = (16,), method: str = "lora"
) -> Iterator[Callable[[], int]]:
    """Yield the step of a host with members of these ranks in turn; it returns the number of tokens."""
    host = TrialHost(
        base, data, num_slots=num, max_rank=max(ranks), token_budget=2**20, with_magnitudes=method == "dora",
        precision=DTYPE,
    )  # fmt: skip
    for seed in range(num):
        trial = random_trial(seed, method=method, rank=ranks[seed % len(ranks)], batch_size=batch_size)
        host.admit(f"trial-{seed}", trial)

    def step() -> int:
        host.step()
        assert host.last_plan is not None
        assert len(host.last_plan.shares) == num
        return host.last_plan.num_tokens

    try:
        yield step
    finally:
        host.bank.remove()


def compare(bench: Bench, name: str, shortest: int, longest: int, batch_size: int, nums: Sequence[int]) -> None:
    """Measure one PEFT trial, and hosts of so many members, on rows of the same lengths."""
    cell = f"{name} {batch_size}x{shortest}" + (f"..{longest}" if longest > shortest else "")
    data = lengths(bench, shortest, longest)
    bench.reset_memory()
    alone = bench.measure(PeftTrial(bench, name, data, batch_size).step, 4)
    bench.tell(cell=cell, **alone.row("peft"), steps=alone.num_steps, peak_gb=round(bench.peak_gb(), 2))
    for num in nums:
        if bench.left_s <= 0:
            return
        bench.reset_memory()
        base = random_base(bench.shape(name), bench.device, DTYPE)
        with host_on(base, data, bench.members(num), batch_size) as step:
            fused = bench.measure(step, 8 if longest > shortest else 5)  # different lengths take more graphs
            row = fused.row("fused") | {"steps": fused.num_steps, "peak_gb": round(bench.peak_gb(), 2)}
            bench.reach(f"{cell} K={num}", fused.tokens_per_s / alone.tokens_per_s, step, cell=cell, members=num, **row)


def compare_memory(bench: Bench, name: str, rank: int) -> None:
    """Measure what a PEFT trial and a host of 16 take from the device, the base included, in steps of 1 x 64 tokens."""
    data, peaks = lengths(bench, 64, 64), []
    bench.reset_memory()
    trial = PeftTrial(bench, name, data, 1, rank=rank)
    for _ in range(3):
        trial.step()
    peaks.append(bench.peak_gb())
    del trial
    bench.reset_memory()
    base = random_base(bench.shape(name), bench.device, DTYPE)
    with host_on(base, data, bench.members(16), 1, ranks=(rank,)) as step:
        for _ in range(4):
            step()
        peaks.append(bench.peak_gb())
    if peaks[0]:
        one_gb, all_gb = (round(peak, 2) for peak in peaks)
        bench.reach(f"{name} memory r={rank}", all_gb / one_gb, one_gb=one_gb, all_gb=all_gb)


def train_135m(bench: Bench) -> None:
    compare(bench, "135M", 64, 256, 1, (16, 32))
    if bench.left_s > 0:
        compare(bench, "135M", 64, 256, 4, (16,))


def train_1b(bench: Bench) -> None:
    for length, batch_size in ((64, 1), (64, 4), (512, 4)):
        if bench.left_s > 0:
            compare(bench, "1B", length, length, batch_size, (16,))


def train_8b(bench: Bench) -> None:
    compare(bench, "8B", 64, 64, 1, (16,))
    for rank in (4, 16):
        if bench.left_s > 0:
            compare_memory(bench, "8B", rank)


def bare_step(base: Base, num_tokens: int) -> Callable[[], int]:
    """Return the forward and the activations' backward of a base without adapters, on packed rows, in a graph."""
    rows = random_data(BARE_LENGTH, BARE_LENGTH, num_rows=max(1, num_tokens // BARE_LENGTH)).train
    forward = FusedForward(base, AdapterBank(base.model, [], 1, 8, with_magnitudes=False), DTYPE)
    packed = pack([Example.from_row(row) for row in rows], forward.attention, pad_id=base.pad_id, device=base.device)

    def differentiable(_: nn.Module, __: object, embedded: Tensor) -> Tensor:
        return embedded.detach().requires_grad_()

    base.model.get_input_embeddings().register_forward_hook(differentiable)

    def compute() -> None:
        with use_packed_attention(base.model, packed), autocast(base.device, DTYPE):
            forward.compute_losses(packed).mean().backward()

    graphs = GraphCache(base.device)

    def step() -> int:
        graphs.run("step", compute)
        return int(packed.input_ids.numel())

    return step


def bare(bench: Bench) -> None:
    for name in ("135M", "1B"):
        bench.reset_memory()
        step = bare_step(random_base(bench.shape(name), bench.device, DTYPE), 340 if bench.dry else BARE_TOKENS)
        speed = bench.measure(step, 3)
        bench.tell(bare=name, **speed.row("bare"))
        if name == "1B":
            bench.reach("bare 1B", speed.tokens_per_s, step)


def share_of_bare(bench: Bench) -> None:
    """Measure members of mixed ranks with as many tokens as the bare base had."""
    data = lengths(bench, BARE_LENGTH, BARE_LENGTH)
    for name in ("1B", "135M"):
        whole = bench.find(bare=name)
        for method in ("lora", "dora"):
            if whole is None or bench.left_s <= 0:
                continue
            bench.reset_memory()
            base = random_base(bench.shape(name), bench.device, DTYPE)
            with host_on(base, data, bench.members(16), MEMBER_BATCH, ranks=MIXED_RANKS, method=method) as step:
                speed = bench.measure(step, 5)
                share = 100 * speed.tokens_per_s / whole["bare_tokens_per_s"]
                if name == "1B":
                    bench.reach(f"{method} share", share, step, **speed.row("fused"))
                else:
                    bench.tell(share_of=name, method=method, share=round(share, 1), **speed.row("fused"))


def one_in_a_graph(bench: Bench) -> None:
    """Measure a single PEFT trial whose whole step is a CUDA graph, at the longest row's width."""
    for name, shortest, longest in (("135M", 64, 256), ("1B", 64, 64)):
        if bench.left_s <= 0:
            return
        bench.reset_memory()
        data = lengths(bench, shortest, longest)
        trial = PeftTrial(bench, name, data, 1)
        speed = bench.measure(graphed(trial, int(data.train.lengths.max())), 4)
        bench.tell(one_in_a_graph=name, **speed.row("graph"))


def processes(bench: Bench) -> None:
    """Measure eight processes at once, plainly and under MPS, against the fused members of an earlier section."""
    num, seconds = (1, 0.1) if bench.dry else (NUM_PROCESSES, 6.0)
    bench.reset_memory()
    found = {"plain": processes_at_once(bench, "135M", num, seconds, {})}
    bench.tell(processes=num, tokens_per_s=round(found["plain"]))
    with mps() as variables:
        if variables is None:
            bench.tell(mps="not there")
        elif bench.left_s > 15:
            found["mps"] = processes_at_once(bench, "135M", num, seconds, variables)
            bench.tell(mps=num, tokens_per_s=round(found["mps"]))
    fused = bench.find(cell="135M 1x64..256", members=16)
    if fused is not None:
        best = max(found.values())
        bench.reach("processes", fused["fused_tokens_per_s"] / best, tokens_per_s=round(best))


def study(bench: Bench) -> None:
    """Train 16 members as a host of a study does: a report, with validation and a snapshot, every 50 steps."""
    every, data = (2, lengths(bench, 5, 12)) if bench.dry else (50, random_data(64, 256))
    changed = {"eval": {"every": every, "max_rows": 8 if bench.dry else 256}, "budget": {"steps": 1_000_000}}
    tree = {"name": "bench", "trial": {"model": {"id": "random"}}, "space": [{"method": {"type": "lora"}}]}
    bench.reset_memory()
    base, stats, num = random_base(bench.shape("135M"), bench.device, DTYPE), HostStats(), bench.members(16)
    host = TrialHost(base, data, num_slots=num, max_rank=16, token_budget=8192, with_magnitudes=False, precision=DTYPE)
    with tempfile.TemporaryDirectory() as scratch:
        loop = HostLoop(host, parse(StudyConfig, tree), stats)
        members = [
            Membership(Candidate(f"trial-{i}", i), random_trial(i, **changed), Path(scratch) / str(i), Path(scratch))
            for i in range(num)
        ]
        loop.move([], members)
        reports = 0
        while reports < 2 or (reports < 4 and bench.left_s > 0 and not bench.dry):
            loop.report(loop.train(members, lambda: False))
            for member in members:
                member.candidate.made += 1
            if not reports:  # the first steps compile and record, which is not a study's usual time
                stats.train_s = stats.eval_s = stats.save_s = 0.0
            reports += 1
    spent = {name: round(getattr(stats, f"{name}_s"), 2) for name in ("train", "eval", "save")}
    host.bank.remove()
    bench.reach("non-step", 100 * (stats.eval_s + stats.save_s) / sum(spent.values()), reports=reports, **spent)


def losses(bench: Bench) -> None:
    """Train SmolLM2 on the built-in data: real losses, of members and of the same trial alone."""
    steps = 2 if bench.dry else 30
    try:
        base = _smollm2(bench)
    except ModelError as error:
        bench.tell(losses=f"no SmolLM2 here: {error}"[:200])
        return
    if base is None:
        bench.tell(losses="left out on a CPU")
        return
    trials = [_real_trial(i, steps) for i in range(4)]
    data = load_data(trials[0].data, base.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        loop = TrainingLoop(trials[0], base, data, LocalSession(Path(scratch), device=bench.device), DTYPE)
        alone = [loop.step().loss for _ in range(steps)]
    del loop, base
    bench.reset_memory()
    fresh = _smollm2(bench)
    assert fresh is not None
    host = TrialHost(fresh, data, num_slots=4, max_rank=16, token_budget=2**15, with_magnitudes=False, precision=DTYPE)
    for i, trial in enumerate(trials):
        host.admit(f"trial-{i}", trial)
    fused = [host.step()[0].loss for _ in range(steps)]
    host.bank.remove()
    apart = max(abs(a - b) for a, b in zip(alone, fused, strict=True))
    bench.tell(
        losses="SmolLM2-135M", first=fused[0], last=fused[-1], alone_last=alone[-1], largest_difference=round(apart, 4)
    )


def _smollm2(bench: Bench) -> Base | None:
    if bench.dry:
        return None
    trial = _real_trial(0, 1)
    return load_base(trial.model, trial.quantization, device=bench.device, dtype=DTYPE, compute_dtype=DTYPE)


def _real_trial(seed: int, steps: int) -> TrialConfig:
    tree = {"name": f"trial-{seed}", "seed": seed, "budget": {"steps": steps}, "optim": {"batch_size": 8}}
    return parse(TrialConfig, tree)


def floors(bench: Bench) -> None:
    """Measure the device's memory bandwidth and matrix products."""
    size = 2**16 if bench.dry else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    target, width = torch.empty_like(source), 64 if bench.dry else 8192
    left, right = (torch.randn(width, width, device=bench.device, dtype=DTYPE) for _ in range(2))

    def copy() -> int:
        target.copy_(source)
        return 2 * size

    def multiply() -> int:
        left @ right
        return 2 * width**3

    bytes_per_s = bench.measure(copy, 1).tokens_per_s
    flop_per_s = bench.measure(multiply, 2).tokens_per_s
    bench.tell(floor=True, bandwidth_gb_per_s=round(bytes_per_s / 1e9, 3), bf16_gflop_per_s=round(flop_per_s / 1e9, 1))
