"""The bank's fast path gives the plain path's results and gradients, for every kind of base and adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankloom import kernels
from rankloom.banks import adapted_linear, ragged
from rankloom.banks.bank import AdapterBank, SlotSpec
from rankloom.config import TrialConfig, parse
from rankloom.config.model import Int8, ModelConfig, Nf4, NoQuantization, Quantization
from rankloom.data import load_data
from rankloom.models import find_target_linears, load_base
from rankloom.training.fused.host import TrialHost

NUM_SLOTS, RANKS = 5, (4, 16, 8, 3, 16)
COUNTS = (6, 0, 11, 2, 7)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
"""Largest norm of a difference, relative to the values' norm; bf16 has 8 bits, and roundings add up over two layers."""
QUANTIZATIONS = {"none": NoQuantization(), "nf4": Nf4(), "int8": Int8()}


def results(
    folder: Path, quantization: Quantization, dtype: torch.dtype, kinds: tuple[bool, ...], targets: str | list[str]
) -> list[Tensor]:
    """Return the logits of a forward with all slots, and the gradients of all A, B and magnitudes."""
    config = parse(ModelConfig, {"id": str(folder)})
    model = load_base(config, quantization, device=torch.device("cpu"), dtype=dtype, compute_dtype=dtype).model
    names = find_target_linears(model, "all-linear")
    bank = AdapterBank(model, names, NUM_SLOTS, max(RANKS), with_magnitudes=any(kinds))
    narrow = find_target_linears(model, targets)
    generator = torch.Generator().manual_seed(0)
    for slot, (rank, dora) in enumerate(zip(RANKS, kinds, strict=True)):
        bank.attach(slot, SlotSpec(rank, 2 * rank, dora=dora, targets=tuple(narrow if slot == 2 else names), seed=slot))
        state = bank.get_state(slot)
        for name, values in state.items():
            noise = torch.randn(values.shape, generator=generator)
            state[name] = values * (1 + 0.05 * noise) if name.endswith(".m") else values + 0.05 * noise
        bank.load_state(slot, state)
    slots_N = torch.arange(-1, NUM_SLOTS).repeat_interleave(torch.tensor([3, *COUNTS]))
    ids = torch.randint(0, 300, (1, len(slots_N)), generator=generator)
    parameters = [p for site in bank.sites.values() for p in (site.a_KRI, site.b_KOR, site.m_KO) if p is not None]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32 and not kernels.use_on(model.device)):
        with bank.apply_route(slots_N, COUNTS):
            logits = model(input_ids=ids, use_cache=False).logits.float()
        weights = torch.randn(logits.shape, generator=generator)
        gradients = torch.autograd.grad((logits * weights).sum(), parameters)
    return [logits.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "qwen", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "dora", "mixed"])
def test_the_fast_path_gives_the_plain_ones_results(
    kind: str, architecture: str, quantization: str, dtype: torch.dtype, tiny_model: Callable[..., Path]
) -> None:
    if architecture == "gpt2" and quantization != "none":
        pytest.skip("transformers quantises no Conv1D")
    kinds = {"lora": (False,) * 5, "dora": (True,) * 5, "mixed": (True, False, False, True, True)}[kind]
    targets = ["c_attn"] if architecture == "gpt2" else ["q_proj", "up_proj"]
    args = (tiny_model(architecture), QUANTIZATIONS[quantization], dtype, kinds, targets)
    expected = results(*args)
    with kernels.everywhere():
        found = results(*args)
    for mine, own in zip(found, expected, strict=True):
        assert mine.shape == own.shape
        assert own.abs().max() > 0
        assert (mine - own).norm() <= TOLERANCE[dtype] * own.norm()


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_on_the_fast_path_gives_the_plain_gradients_of_its_masks(
    dora: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result() -> list[Tensor]:
        config = parse(ModelConfig, {"id": str(tiny_llama)})
        model = load_base(config, NoQuantization(), device=torch.device("cpu")).model
        names = find_target_linears(model, ["q_proj", "down_proj"])
        bank = AdapterBank(model, names, NUM_SLOTS, 16, with_magnitudes=dora)
        for slot in (0, 2):
            bank.attach(slot, SlotSpec(8, 16, dora=dora, dropout=0.3 * (slot == 2), targets=tuple(names), seed=slot))
            bank.load_state(slot, {k: v + 0.1 * torch.cos(torch.arange(v.numel()).view(v.shape)) for k, v in
                                   bank.get_state(slot).items()})  # fmt: skip
        slots_N = torch.arange(-1, NUM_SLOTS).repeat_interleave(torch.tensor([3, 6, 0, 11, 0, 0]))
        ids = torch.arange(len(slots_N))[None]
        parameters = [p for site in bank.sites.values() for p in (site.a_KRI, site.b_KOR, site.m_KO) if p is not None]
        with bank.apply_route(slots_N, (6, 0, 11, 0, 0), dropout_seeds={0: 4, 2: 5}):
            logits = model(input_ids=ids, use_cache=False).logits
        return [logits.detach(), *torch.autograd.grad(logits.square().mean(), parameters)]

    masks: list[Tensor] = []

    def record(x: Tensor, *args: Any) -> Tensor:
        masks.append(drop(torch.ones_like(x), *args))
        return drop(x, *args)

    drop = ragged.ragged_dropout
    monkeypatch.setattr(ragged, "ragged_dropout", record)
    with kernels.everywhere():
        found = result()
    forward = iter(masks[:4])
    monkeypatch.setattr(adapted_linear, "_draw_mask", lambda x, *_: next(forward).view(x.shape))
    expected = result()
    assert 0.1 < (masks[0] == 0).float().mean() < 0.3
    for mine, own in zip(found, expected, strict=True):
        assert (mine - own).norm() <= TOLERANCE[torch.float32] * own.norm()


def test_the_fast_path_rounds_ranks_up(tiny_llama: Path) -> None:
    model = load_base(parse(ModelConfig, {"id": str(tiny_llama)}), NoQuantization(), device=torch.device("cpu")).model
    with kernels.everywhere():
        bank = AdapterBank(model, find_target_linears(model, ["q_proj"]), 2, 12, with_magnitudes=False)
        bank.attach(0, SlotSpec(12, 12, targets=tuple(bank.sites)))
    site = next(iter(bank.sites.values()))
    assert site.a_KRI.shape[1] == 16
    assert {values.shape[name.endswith(".b")] for name, values in bank.get_state(0).items()} == {12}


MEMBERS: tuple[dict[str, object], ...] = (
    {"method": {"type": "lora", "rank": 4}, "optim": {"learning_rate": 2e-3, "batch_size": 3}},
    {"method": {"type": "dora", "rank": 12}, "optim": {"batch_size": 2, "accumulation": 2, "loraplus_ratio": 4}},
    {
        "method": {"type": "lora", "rank": 8, "target_modules": ["q_proj"]},
        "optim": {"clip_norm": 0.05, "batch_size": 1},
    },
)


def losses(folder: Path, precision: str, dropout: float, checkpoints: Path) -> list[float]:
    """Return the losses of six steps of a host; amid them a member is evicted, and comes back from its checkpoint."""
    trials = [
        parse(
            TrialConfig,
            {"name": "x", "model": {"id": str(folder), "dtype": precision}, "data": {"max_train_rows": 24}, **member},
        )
        for member in MEMBERS
    ]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    base = load_base(trials[0].model, NoQuantization(), device=torch.device("cpu"))
    data = load_data(trials[0].data, base.tokenizer)
    trials[0] = trials[0].model_copy(update={"method": trials[0].method.model_copy(update={"dropout": dropout})})
    host = TrialHost(base, data, num_slots=4, max_rank=12, token_budget=10_000, with_magnitudes=True, precision=dtype)
    for i, trial in enumerate(trials):
        host.admit(str(i), trial)
    found = [report.loss for _ in range(3) for report in host.step()]
    checkpoints.mkdir()
    host.save("0", checkpoints)
    host.evict("0")
    host.admit("late", trials[2])
    host.admit("0", trials[0], checkpoints)
    return found + [report.loss for _ in range(3) for report in host.step()]


@pytest.mark.parametrize(
    ("precision", "dropout", "tolerance"), [("fp32", 0.0, 1e-4), ("bf16", 0.0, 2e-2), ("bf16", 0.05, 0.1)]
)
def test_a_host_trains_alike_on_both_paths(
    precision: str, dropout: float, tolerance: float, tiny_llama: Path, tmp_path: Path
) -> None:
    """With dropout the paths draw different masks."""
    plain = losses(tiny_llama, precision, dropout, tmp_path / "plain")
    with kernels.everywhere():
        fast = losses(tiny_llama, precision, dropout, tmp_path / "fast")
    assert len(fast) == len(plain) > 12
    assert fast == pytest.approx(plain, rel=tolerance)
    assert len({round(loss, 3) for loss in plain}) > 6  # members learn
