"""On a GPU, the fast path's members train and are scored as the plain path's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from answers import trial_of
from rankloom import kernels
from rankloom.data import load_data
from rankloom.models import load_tokenizer
from rankloom.training.fused.host import TrialHost
from rankloom.training.precision import load_trial_base

MEMBERS = [("lora", 4), ("dora", 8), ("lora", 16), ("dora", 12)]
TOLERANCE = 3e-2
"""Of a loss in bf16, between two orders of addition."""


@contextmanager
def plain_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "_everywhere", False)
        patched.setattr(kernels, "_has_triton", lambda: False)
        yield


def train(
    model: Path, root: Path, device: torch.device, quantization: str, steps: int
) -> tuple[list[float], TrialHost]:
    """Return the members' losses of every step and their validation losses, in order; and the host."""
    trials = [
        trial_of(model, root, {"method": {"type": kind, "rank": rank}, "quantization": quantization})
        for kind, rank in MEMBERS
    ]
    base = load_trial_base(trials[0], device)
    data = load_data(trials[0].data, load_tokenizer(trials[0].model))
    host = TrialHost(
        base, data, num_slots=5, max_rank=16, token_budget=4096, with_magnitudes=True, precision=torch.bfloat16
    )
    for i, trial in enumerate(trials):
        host.admit(f"trial-{i}", trial)
    losses = [report.loss for _ in range(steps) for report in host.step()]
    return losses + [found.loss for _, found in sorted(host.evaluate().items())], host


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_members_train_as_on_the_plain_path(
    quantization: str, device: torch.device, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with plain_path(monkeypatch):
        expected, plain = train(tiny_llama, tmp_path, device, quantization, 6)
        assert not plain.forward.chunked
    found, fast = train(tiny_llama, tmp_path, device, quantization, 6)
    assert fast.forward.chunked
    assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def test_a_step_that_returns_is_recorded(cuda: torch.device, tiny_llama: Path, tmp_path: Path) -> None:
    losses, host = train(tiny_llama, tmp_path, cuda, "none", 8)
    assert host.sums.graphs.is_on
    assert host.sums.graphs.num_recorded
    assert losses[-1] < losses[0]


def test_values_that_are_not_finite_stay_in_their_slot(device: torch.device, tiny_llama: Path, tmp_path: Path) -> None:
    expected, _ = train(tiny_llama, tmp_path, device, "none", 5)
    _, host = train(tiny_llama, tmp_path, device, "none", 2)
    host.bank.sites[next(iter(host.bank.sites))].get_parts(1)["a"].fill_(torch.inf)
    host.bank.sites[next(iter(host.bank.sites))].update_shadows(1)
    reports = {report.name: report for _ in range(3) for report in host.step()}
    assert reports["trial-1"].error is not None
    assert "trial-1" not in host.members
    others = [reports[f"trial-{i}"].loss for i in (0, 2, 3)]
    assert others == pytest.approx([expected[4 * 4 + i] for i in (0, 2, 3)], rel=TOLERANCE)
