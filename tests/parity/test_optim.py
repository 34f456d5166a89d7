"""AdamW over slots = torch's AdamW a slot, clipped by torch; who does not step keeps every bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rankloom.config.trial import OptimConfig
from rankloom.training.fused import optim as slots
from rankloom.training.fused.optim import SlotAdamW, SlotParameter

K, RANK = 4, 5
SETTINGS = {
    0: OptimConfig(learning_rate=1e-2),
    1: OptimConfig(learning_rate=3e-3, loraplus_ratio=16, weight_decay=0.3, clip_norm=0.1),
    3: OptimConfig(learning_rate=5e-2, betas=(0.5, 0.9), eps=1e-3, clip_norm=None, weight_decay=0.01),
}


def parameters() -> list[SlotParameter]:
    torch.manual_seed(0)
    shapes = {"p.a": (RANK, 7), "q.a": (RANK, 7), "r.a": (RANK, 3), "p.b": (6, RANK), "q.b": (6, RANK), "p.m": (6,)}
    return [SlotParameter(n, n[-1], nn.Parameter(torch.randn(K, *shape))) for n, shape in shapes.items()]  # type: ignore[arg-type]


def gradients(step: int, like: list[SlotParameter]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.parameter.shape, generator=generator) for p in like]


def stepped(optimizer: SlotAdamW, given: list[Tensor | None], factors: dict[int, float]) -> list[float]:
    stacks = optimizer.gather(list(given))
    before = [stack.clone() for stack in stacks]
    norms: list[float] = optimizer.step(stacks, torch.zeros(K), factors).tolist()
    assert all(map(torch.equal, stacks, before))
    return norms


@pytest.mark.parametrize("chunk", [1, 2**20])
def test_each_slot_is_torchs_adamw(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "CHUNK", chunk)
    fused = parameters()
    optimizer = SlotAdamW(fused, K)
    alone: dict[int, tuple[list[nn.Parameter], torch.optim.AdamW]] = {}
    for slot, optim in SETTINGS.items():
        optimizer.assign(slot, optim, RANK)
        own = [nn.Parameter(p.parameter.detach()[slot].clone()) for p in fused]
        ratio = optim.loraplus_ratio
        groups = [
            {"params": [own[i]], "lr": optim.learning_rate * (1 if p.role == "a" else ratio)}
            for i, p in enumerate(fused)
        ]
        adamw = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
        alone[slot] = own, adamw
    peaks = {slot: [g["lr"] for g in adamw.param_groups] for slot, (_, adamw) in alone.items()}
    idle = [p.parameter.detach()[2].clone() for p in fused]
    for step in range(20):
        given = gradients(step, fused)
        factors = {slot: 1 - step / 30 for slot in SETTINGS if slot != 3 or step % 2}  # slot 3 steps every other time
        norms = stepped(optimizer, given, factors)
        for slot, factor in factors.items():
            own, adamw = alone[slot]
            for parameter, gradient in zip(own, given, strict=True):
                assert gradient is not None
                parameter.grad = gradient[slot].clone()
            limit = SETTINGS[slot].clip_norm
            norm = nn.utils.clip_grad_norm_(own, float("inf") if limit is None else limit)
            assert norms[slot] == pytest.approx(float(norm), rel=1e-5)
            for group, peak in zip(adamw.param_groups, peaks[slot], strict=True):
                group["lr"] = peak * factor
            adamw.step()
    for slot, (own, _) in alone.items():
        for parameter, item in zip(own, fused, strict=True):
            torch.testing.assert_close(item.parameter.detach()[slot], parameter.detach(), atol=1e-5, rtol=1e-5)
    for value, item in zip(idle, fused, strict=True):
        assert torch.equal(item.parameter.detach()[2], value)


def test_who_does_not_step_keeps_every_bit() -> None:
    fused = parameters()
    optimizer = SlotAdamW(fused, K)
    for slot, optim in SETTINGS.items():
        optimizer.assign(slot, optim, RANK)
    stepped(optimizer, gradients(0, fused), {0: 1.0, 1: 1.0, 3: 1.0})
    before = {**optimizer.get_state(1, RANK), **{p.name: p.parameter.detach()[1].clone() for p in fused}}
    stepped(optimizer, gradients(1, fused), {0: 1.0, 3: 0.5})
    after = {**optimizer.get_state(1, RANK), **{p.name: p.parameter.detach()[1] for p in fused}}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_padding_stays_zero_and_missing_gradients_are_zero() -> None:
    fused = parameters()
    optimizer = SlotAdamW(fused, K)
    optimizer.assign(0, SETTINGS[3], 2)
    with torch.no_grad():
        for item in fused:
            if item.role != "m":
                kept = item.trim(item.parameter[0], 2).clone()
                item.parameter[0].zero_()
                item.trim(item.parameter[0], 2).copy_(kept)
    for step in range(3):
        given = gradients(step, fused)
        for i, item in enumerate(fused):
            gradient = given[i]
            assert gradient is not None
            if item.role == "a":
                gradient[0, 2:] = 0
            if item.role == "b":
                gradient[0, :, 2:] = 0
        given[1] = None
        stepped(optimizer, given, {0: 1.0})
    for item in fused:
        if item.role == "a":
            assert not item.parameter[0, 2:].any()
        if item.role == "b":
            assert not item.parameter[0, :, 2:].any()


def test_state_moves_between_slots_and_clearing_forgets() -> None:
    one, two = parameters(), parameters()
    first, second = SlotAdamW(one, K), SlotAdamW(two, K)
    first.assign(1, SETTINGS[1], RANK)
    for step in range(3):
        stepped(first, gradients(step, one), {1: 1.0})
    second.assign(0, SETTINGS[1], RANK)
    stepped(second, gradients(9, two), {0: 1.0})
    second.load_state(0, RANK, first.get_state(1, RANK))
    for name, value in first.get_state(1, RANK).items():
        assert torch.equal(value, second.get_state(0, RANK)[name])
    second.copy(0, 3)
    assert second.counts == [3, 0, 0, 3]
    assert torch.equal(second.get_state(3, RANK)["second.p.b"], first.get_state(1, RANK)["second.p.b"])
    second.clear(0)
    assert not any(value.any() for value in second.get_state(0, RANK).values())
    assert second.get_state(0, 2)["first.q.a"].shape == (2, 7)
    assert second.get_state(0, 2)["first.q.b"].shape == (6, 2)
