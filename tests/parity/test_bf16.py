"""bf16 from end to end, as every run on a GPU goes: trained, exported, published, verified and served, on a CPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file

from answers import RECIPES, served, trial_of
from rankloom import kernels
from rankloom.adapters.weights import load_adapter
from rankloom.banks.bank import AdapterBank, SlotSpec
from rankloom.banks.grouped import scale_rows, scale_rows_reference
from rankloom.banks.groups import Groups
from rankloom.banks.served_adapter import ServedAdapter, fold
from rankloom.banks.served_bank import AdapterShare, ServedBank
from rankloom.config.model import ModelConfig, NoQuantization
from rankloom.data import load_data
from rankloom.errors import TrialError
from rankloom.evals.loss import compute_token_loss
from rankloom.events import Event
from rankloom.models import Base, choose_auto_dtype, load_base, load_tokenizer
from rankloom.registry import Registry
from rankloom.training.fused.host import TrialHost
from rankloom.training.loop import TrainingLoop
from rankloom.training.precision import autocast, load_trial_base
from rankloom.training.publish import check_export
from rankloom.training.run import run_trial
from rankloom.training.session import LocalSession
from served import write_adapter

CPU = torch.device("cpu")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_in_bf16_is_served_as_it_was_scored(
    recipe: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    trial = trial_of(tiny_llama, tmp_path, recipe)
    result = run_trial(trial, LocalSession(tmp_path / "run", device=CPU))
    Registry(tmp_path / "registry").verify("low@1")
    card = result["scorecard"]
    assert card.base is not None
    assert [measures.exact_match and measures.exact_match.value for measures in (card.base, card.result)] == [0, 1]
    data = load_data(trial.data, load_tokenizer(trial.model))
    expected = [row.input_ids[row.prompt_length :] for row in data.test]  # which is what was scored: all are right
    assert served(trial, tmp_path / "registry", data, CPU) == expected


def test_a_host_in_bf16_trains_and_exports_what_dedicated_runs_do(tiny_llama: Path, tmp_path: Path) -> None:
    trials = {kind: trial_of(tiny_llama, tmp_path, {"method": {"type": kind, "rank": 8}}) for kind in ("lora", "dora")}
    bases = [load_trial_base(trials["lora"], CPU) for _ in range(3)]
    data = load_data(trials["lora"].data, bases[0].tokenizer)
    assert bases[0].model.dtype == torch.bfloat16
    host = TrialHost(
        bases[0], data, num_slots=2, max_rank=8, token_budget=2048, with_magnitudes=True, precision=torch.bfloat16
    )
    for kind, trial in trials.items():
        host.admit(kind, trial)
    fused = [{report.name: report.loss for report in host.step()} for _ in range(6)]
    for (kind, trial), base in zip(trials.items(), bases[1:], strict=True):
        alone: list[Event] = []
        session = LocalSession(tmp_path / kind, device=CPU, on_event=alone.append)
        loop = TrainingLoop(trial, base, data, session, torch.bfloat16)
        for step in range(6):
            loop.step()
            assert fused[step][kind] == pytest.approx(alone[-1].loss, rel=2e-2)
        assert fused[-1][kind] < 0.8 * fused[0][kind]
        host.export(kind, tmp_path / kind / "adapter")
    losses = {kind: evaluation.loss for kind, evaluation in host.evaluate().items()}
    host.bank.remove()
    for kind, loss in losses.items():
        adapted = load_adapter(bases[0].model, tmp_path / kind / "adapter")
        read_back = compute_token_loss(adapted, list(data.validation), pad_id=bases[0].pad_id, batch_size=4).mean
        adapted.unload()
        assert loss == pytest.approx(read_back, rel=2e-2)


def test_what_is_read_back_keeps_lora_in_fp32(tiny_llama: Path, tmp_path: Path) -> None:
    write_adapter(tiny_llama, tmp_path, "dora")
    base = load_base(ModelConfig(id=str(tiny_llama)), NoQuantization(), device=CPU, dtype=torch.bfloat16)
    state = get_peft_model_state_dict(load_adapter(base.model, tmp_path))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored.keys() == state.keys()
    for name, tensor in stored.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], tensor)


def test_an_export_of_other_weights_is_refused_in_bf16_too() -> None:
    trained = 10 * torch.rand(400, generator=torch.Generator().manual_seed(0)).bfloat16()
    check_export(trained * 1.004, trained, "none")
    with pytest.raises(TrialError, match="differ by"):
        check_export(trained.flip(0), trained, "none")
    exact = trained.float()
    with pytest.raises(TrialError, match="differ by"):
        check_export(exact * 1.004, exact, "none")


@pytest.mark.parametrize("counts", [(3, 3), (2, 5)], ids=["even", "uneven"])
@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_magnitudes_act_in_fp32(counts: tuple[int, int], by_slot: bool, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1, sum(counts), 64, generator=generator).requires_grad_()
    factor_KO = (1 + 2e-3 * torch.randn(2, 64, generator=generator)).requires_grad_()
    bias_O = torch.randn(64, generator=generator).bfloat16() if biased else None
    groups = Groups(counts, (4, 4))
    given = torch.randn(sum(counts), 64, generator=generator)
    expected_NO = scale_rows_reference(y[0], factor_KO, None if bias_O is None else bias_O.float(), groups)
    expected = torch.autograd.grad(expected_NO, (y, factor_KO), given)
    found = scale_rows(y, factor_KO, bias_O, groups, dtype=torch.bfloat16, by_slot=by_slot)
    assert torch.allclose(found[0].float(), expected_NO, rtol=2**-8)
    dy, dfactor_KO = torch.autograd.grad(found, (y, factor_KO), given.bfloat16()[None])
    assert torch.allclose(dy.float(), expected[0].float(), rtol=2**-7)
    assert torch.allclose(dfactor_KO, expected[1], rtol=1e-2, atol=2e-2)


FACTOR = 1.001
"""On what was rounded to bf16 before, it does nothing at all."""


@pytest.fixture
def low_base(tiny_llama: Path) -> Base:
    return load_base(ModelConfig(id=str(tiny_llama)), NoQuantization(), device=CPU, dtype=torch.bfloat16)


def effect(changed: torch.Tensor, plain: torch.Tensor) -> float:
    """By how much a linear's outputs became larger."""
    found = (changed.float() * plain.float()).sum() / plain.float().square().sum() - 1
    return float(found)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_host_sees_magnitudes_below_a_step_of_bf16(dropout: float, low_base: Base) -> None:
    name = "model.layers.0.mlp.gate_proj"
    bank = AdapterBank(low_base.model, [name], 2, 4, with_magnitudes=True)
    for slot in range(2):
        bank.attach(slot, SlotSpec(rank=4, alpha=8, dora=True, dropout=dropout, targets=(name,), seed=slot))
        bank.sites[name].get_parts(slot)["b"].normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 400, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    m_KO = bank.sites[name].m_KO
    assert m_KO is not None

    def through() -> torch.Tensor:
        slots_N = torch.tensor([0] * 100 + [1] * 300)
        with (
            torch.no_grad(),
            bank.apply_route(slots_N, [100, 300], dropout_seeds={0: 1, 1: 2}),
            autocast(CPU, torch.bfloat16),
        ):
            return low_base.model.get_submodule(name)(x)

    before = through()
    m_KO.data.mul_(FACTOR)
    assert before.dtype == torch.bfloat16
    assert effect(through(), before) == pytest.approx(FACTOR - 1, rel=0.3)


@pytest.mark.parametrize("way", ["loose", "compiled", "in slots"])
def test_the_engine_sees_magnitudes_below_a_step_of_bf16(
    way: str, low_base: Base, tiny_llama: Path, tmp_path: Path
) -> None:
    write_adapter(tiny_llama, tmp_path, "dora")
    name, counts, found = "model.layers.0.mlp.gate_proj", (3, 40), []
    own = fold(low_base.model, tmp_path).linears[name]
    with kernels.everywhere() if way == "in slots" else nullcontext():
        bank = ServedBank(low_base.model)
    bank.compiles = way == "compiled"
    x = torch.randn(1, sum(counts), 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert own.factor_O is not None
    for factor in (1.0, FACTOR):
        changed = replace(own, factor_O=torch.full_like(own.factor_O, factor))
        adapters = [ServedAdapter({name: changed}, {}, {}) for _ in counts]
        for adapter in adapters:
            bank.admit(adapter)
        route = bank.route([AdapterShare(a, count, count) for a, count in zip(adapters, counts, strict=True)])
        assert (len(route.body.loose), bool(route.body.compiled), bool(route.body.slots)) == (
            2 * (way == "loose"),
            way == "compiled",
            way == "in slots",
        )
        with torch.no_grad(), bank.apply_route(route):
            found.append(low_base.model.get_submodule(name)(x))
    bank.remove()
    assert effect(found[1], found[0]) == pytest.approx(FACTOR - 1, rel=0.5)


def test_auto_is_bf16_on_a_gpu_alone(tiny_llama: Path) -> None:
    assert choose_auto_dtype(torch.device("cuda", 1)) == torch.bfloat16
    assert choose_auto_dtype(CPU) == torch.float32
    assert load_base(ModelConfig(id=str(tiny_llama)), NoQuantization(), device=CPU).model.dtype == torch.float32
