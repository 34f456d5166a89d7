"""A step in one go = the same step in parts: on sizes that are rounded, recorded as a graph, and replayed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_gpu import one_gpu
from fake_graph import fake_graphs
from rankloom import kernels
from rankloom.config import TrialConfig, parse
from rankloom.data import load_data
from rankloom.models import load_base, load_tokenizer
from rankloom.training.fused.device_step import DeviceStep
from rankloom.training.fused.host import StepReport, TrialHost
from rankloom.training.fused.packing import Arranged

CPU = torch.device("cpu")
TOLERANCE = 5e-4
"""Of losses in fp32, relative: products are added up in other orders, over some tens of steps."""
MEMBERS: dict[str, dict[str, Any]] = {
    "plain": {"method": {"type": "lora", "rank": 4, "alpha": 8}, "optim": {"learning_rate": 2e-3}},
    "plus": {
        "method": {"type": "lora", "rank": 8, "alpha": 32},
        "optim": {"loraplus_ratio": 16, "batch_size": 4, "schedule": "cosine", "clip_norm": 0.05},
    },
    "parts": {
        "method": {"type": "lora", "rank": 3, "target_modules": ["q_proj", "v_proj"]},
        "optim": {"batch_size": 6, "accumulation": 3, "weight_decay": 0.1, "clip_norm": None},
    },
    "other": {"method": {"type": "lora", "rank": 8}, "optim": {"learning_rate": 1e-3}},
    "dora": {"method": {"type": "dora", "rank": 6}, "optim": {"learning_rate": 4e-3, "batch_size": 5}},
}  # fmt: skip


def trial_of(model: Path, name: str, quantization: str = "none", **method: Any) -> TrialConfig:
    tree: dict[str, Any] = {
        "name": "one-go",
        "model": {"id": str(model)},
        "quantization": quantization,
        "data": {"max_train_rows": 64},
        "budget": {"steps": 100},
        "eval": {"every": 10, "max_rows": 16},
    }
    member = MEMBERS[name]
    optim = {"batch_size": 3, "group_by_length": False} | member["optim"]
    return parse(TrialConfig, tree | {"method": member["method"] | method, "optim": optim})


def host_of(model: Path, quantization: str = "none", *, num_slots: int = 5) -> TrialHost:
    trial = trial_of(model, "plain", quantization)
    base = load_base(trial.model, trial.quantization, device=CPU)
    data = load_data(trial.data, load_tokenizer(trial.model))
    return TrialHost(base, data, num_slots=num_slots, max_rank=8, token_budget=100_000, with_magnitudes=True)


class Pair:
    """The same members in a host that steps in one go, with graphs, and in a plain one."""

    def __init__(self, model: Path, quantization: str = "none") -> None:
        self.model, self.quantization, self.plain = model, quantization, host_of(model, quantization)
        with kernels.everywhere():
            self.fast = host_of(model, quantization)
        assert self.fast.forward.is_one_go
        assert not self.plain.forward.is_one_go
        self.fast.sums.graphs.is_on = True

    def admit(self, *names: str, **method: Any) -> None:
        for name in names:
            trial = trial_of(self.model, name, self.quantization, **method)
            self.plain.admit(name, trial)
            with kernels.everywhere():
                self.fast.admit(name, trial)

    def evict(self, name: str) -> None:
        self.plain.evict(name)
        self.fast.evict(name)

    def step(self, num_steps: int) -> list[StepReport]:
        """Return the reports of the host that steps in one go; the plain one's agree."""
        found = []
        for _ in range(num_steps):
            with kernels.everywhere():
                fast = self.fast.step()
            for mine, reference in zip(fast, self.plain.step(), strict=True):
                assert replace(mine, loss=0.0, error=None) == replace(reference, loss=0.0, error=None)
                assert (mine.error is None) == (reference.error is None)
                assert mine.loss == pytest.approx(reference.loss, rel=TOLERANCE, nan_ok=True), mine.name
            found += fast
        return found

    @property
    def num_replays(self) -> int:
        return sum(each.graph.num_replays for each in self.fast.sums.graphs._recordings.values())


@pytest.fixture(autouse=True)
def _graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_graphs(monkeypatch)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_members_join_leave_and_accumulate_in_replays(quantization: str, tiny_llama: Path) -> None:
    hosts = Pair(tiny_llama, quantization)
    hosts.admit("plain", "plus")
    hosts.step(12)
    recorded, replays = hosts.fast.sums.graphs.num_recorded, hosts.num_replays
    assert replays > 2
    hosts.evict("plain")
    hosts.admit("other")
    hosts.step(12)
    assert hosts.num_replays > replays + 4  # most steps have sizes that are known
    assert hosts.fast.sums.graphs.num_recorded <= recorded + 3
    hosts.admit("parts", "dora")
    hosts.step(24)
    assert hosts.fast.sums.graphs.is_on
    for name in hosts.plain.members:
        plain, fast = (host.bank.get_state(host.members[name].slot) for host in (hosts.plain, hosts.fast))
        for key, value in plain.items():
            torch.testing.assert_close(fast[key], value, rtol=1e-2, atol=2e-4, msg=key)


def test_a_diverging_member_leaves_its_neighbours_alone_in_a_replay(tiny_llama: Path) -> None:
    hosts = Pair(tiny_llama)
    hosts.admit("plain", "dora", "other")
    hosts.step(10)
    replays = hosts.num_replays
    for host in (hosts.plain, hosts.fast):
        slot = host.members["plain"].slot
        with torch.no_grad():
            for site in host.bank.sites.values():
                site.b_KOR[slot] = math.inf
                site.update_shadows(slot)
    ended = {report.name: report.error for report in hosts.step(1)}
    assert "diverged at step" in (ended["plain"] or "")
    assert ended["dora"] is ended["other"] is None
    hosts.admit("plain")  # the slot is as good as new
    assert not any(report.error for report in hosts.step(8))
    assert hosts.num_replays > replays


def test_replays_draw_the_dropout_of_their_step(tiny_llama: Path) -> None:
    with kernels.everywhere():
        whole, parts = host_of(tiny_llama), host_of(tiny_llama)
        whole.sums.graphs.is_on, parts.forward.is_one_go = True, False
        for name, dropout in (("plain", 0.3), ("other", 0.0), ("dora", 0.2)):
            for host in (whole, parts):
                host.admit(name, trial_of(tiny_llama, name, dropout=dropout))
        for _ in range(12):
            for mine, reference in zip(whole.step(), parts.step(), strict=True):
                assert mine.loss == pytest.approx(reference.loss, rel=TOLERANCE), mine.name
    assert sum(each.graph.num_replays for each in whole.sums.graphs._recordings.values()) > 2
    assert not parts.sums.graphs._seen


def test_it_is_resumed_to_rounding(tiny_llama: Path, tmp_path: Path) -> None:
    hosts = Pair(tiny_llama)
    hosts.admit("plain", "parts")
    hosts.step(7)
    with kernels.everywhere():
        again = host_of(tiny_llama)
        for name in ("plain", "parts"):
            (tmp_path / name).mkdir()
            hosts.fast.save(name, tmp_path / name)
            again.admit(name, trial_of(tiny_llama, name), tmp_path / name)
        losses: list[dict[str, list[float]]] = [{}, {}]
        for host, found in zip((hosts.fast, again), losses, strict=True):
            for _ in range(6):
                for report in host.step():
                    found.setdefault(report.name, []).append(report.loss)
    assert losses[0]["plain"] == pytest.approx(losses[1]["plain"], rel=TOLERANCE)
    for left, right in zip(losses[0]["parts"], losses[1]["parts"], strict=False):
        assert left == pytest.approx(right, rel=TOLERANCE)


@pytest.mark.parametrize("recording", [False, True])
def test_running_out_of_memory_ends_as_in_parts(
    recording: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = Pair(tiny_llama)
    hosts.admit("plain", "plus")
    whole, room = DeviceStep._compute_gradients, [10_000]
    calls: list[int] = []

    def limited(self: DeviceStep, arranged: Arranged, *args: Any) -> Any:
        calls.append(arranged.num_tokens)
        if self is hosts.fast.sums and arranged.num_tokens > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, arranged, *args)

    monkeypatch.setattr(DeviceStep, "_compute_gradients", limited)
    hosts.step(8 if recording else 0)
    assert bool(hosts.num_replays) == recording
    hosts.fast.sums.graphs._recordings.clear()  # so that sizes are recorded again
    room[0] = 120
    hosts.step(1)
    assert not hosts.fast.sums.graphs.num_recorded
    assert hosts.fast.token_budget <= max(calls) // 2
    room[0] = 10_000
    hosts.fast.token_budget = 100_000
    hosts.step(4)


def test_what_is_recorded_needs_nothing_of_the_host(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake GPU, whose tensors don't mix with a CPU's, a whole step is recorded: forward, backward and AdamW."""
    with one_gpu(monkeypatch) as gpu:
        trial = trial_of(tiny_llama, "plain")
        base = load_base(trial.model, trial.quantization, device=gpu, dtype=torch.float32)
        data = load_data(trial.data, load_tokenizer(trial.model))
        host = TrialHost(base, data, num_slots=5, max_rank=8, token_budget=100_000, with_magnitudes=True)
        for name in ("plain", "dora", "parts"):
            host.admit(name, trial_of(tiny_llama, name))
        host.admit("dropped", trial_of(tiny_llama, "dora", dropout=0.1))
        for _ in range(24):
            assert not any(report.error for report in host.step())
        graphs = host.sums.graphs
        assert graphs.is_on
        assert graphs.num_recorded
        for recording in graphs._recordings.values():
            names = {operation[0].name().split("::")[-1] for operation in recording.graph.operations}
            assert {
                "ragged_gradients",
                "ragged_dropout",
                "row_attention_backward",
                "slot_squares",
                "slot_adamw",
            } <= names


def test_sizes_are_rounded_without_a_change(tiny_llama: Path) -> None:
    """Rows keep their tokens; what is added is nobody's, in rows that are no longer than `longest`."""
    host = host_of(tiny_llama)
    with kernels.everywhere():
        fast = host_of(tiny_llama)
    examples = [host._example(row) for row in range(11)]
    arranged = fast.forward.arrange(examples, sorted(row % 3 for row in range(11)))
    rounded = arranged.round_sizes(5)
    idle = rounded.num_tokens - arranged.num_tokens
    assert 0 < idle <= arranged.num_tokens // 8 + 1
    starts = rounded.arrays["starts_B1"]
    assert starts[0] == 0
    assert starts[-1] == rounded.num_tokens
    assert 0 <= np.diff(starts).min() <= np.diff(starts).max() <= rounded.longest
    assert set(arranged.arrays["starts_B1"] + idle) <= set(starts)
    for name in ("input_ids", "position_ids", "slots_N"):
        assert np.array_equal(rounded.arrays[name][..., idle:], arranged.arrays[name])
    assert (rounded.arrays["slots_N"][:idle] == -1).all()
    num = len(arranged.arrays["weights_M"])
    assert np.array_equal(rounded.arrays["predicting_M"][:num], arranged.arrays["predicting_M"] + idle)
    assert (rounded.arrays["predicting_M"][num:] < idle).all()
    assert (rounded.arrays["slots_M"][num:] == 5).all()
    assert not rounded.arrays["weights_M"][num:].any()
