"""Each method by itself: what trains, how it steps, what it remembers and what it frees."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from galore_torch import GaLoreAdamW
from transformers import AutoModelForCausalLM

from rankloom.adapters.weights import load_adapter
from rankloom.config import COMPATIBLE, parse
from rankloom.config.model import NoQuantization
from rankloom.config.trial import TrialConfig
from rankloom.methods import METHODS, build_method
from rankloom.methods.galore import ProjectedAdamW, ProjectedAdamW8bit
from rankloom.models import Base, load_base

CPU = torch.device("cpu")


def trial_of(model: Path, method: dict[str, Any], **optim: Any) -> TrialConfig:
    return parse(TrialConfig, {"name": "t", "model": {"id": str(model)}, "method": method, "optim": optim})


def base_of(trial: TrialConfig) -> Base:
    return load_base(trial.model, trial.quantization, device=CPU)


def loss_of(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(5, 300, (4, 12), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids).loss


def steps(trial: TrialConfig, num_steps: int, total: int | None = None):
    """Run `num_steps` bare optimiser steps; the method, the model and the optimiser."""
    torch.manual_seed(0)
    base = base_of(trial)
    method = build_method(trial, total or num_steps)
    model = method.attach(base)
    optimizer = method.build_optimizer(model, trial.optim)
    for step in range(num_steps):
        method.before_step(model, optimizer, step)
        penalty = method.compute_penalty(model)
        (loss_of(model, step) + (0 if penalty is None else penalty)).backward()
        optimizer.step()
        method.after_step(model, step)
        optimizer.zero_grad()
    return method, model, optimizer, base


def test_the_table_covers_every_config_and_no_other() -> None:
    assert {cls.model_fields["type"].default for cls in METHODS} == set(COMPATIBLE)


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "full", "galore", "lisa"])
@pytest.mark.parametrize("architecture", ["llama", "qwen", "gpt2"])
def test_every_method_lowers_the_loss_of_every_architecture(
    kind: str, architecture: str, tiny_model: Callable[..., Path]
) -> None:
    options = {"lisa": {"num_layers": 1}, "galore": {"rank": 8}, "adalora": {"interval": 1}}.get(kind, {})
    trial = trial_of(tiny_model(architecture), {"type": kind, **options}, learning_rate=5e-3)
    torch.manual_seed(0)
    base = base_of(trial)
    method = build_method(trial, 15)
    model = method.attach(base)
    optimizer = method.build_optimizer(model, trial.optim)
    model.eval()
    before = loss_of(model).item()
    for step in range(15):
        method.before_step(model, optimizer, step)
        loss_of(model).backward()
        optimizer.step()
        method.after_step(model, step)
        optimizer.zero_grad()
    assert loss_of(model).item() < before - 0.05


def test_lora_plus_gives_b_its_own_rate(tiny_llama: Path) -> None:
    trial = trial_of(tiny_llama, {"type": "dora"}, learning_rate=1e-3, loraplus_ratio=16)
    method = build_method(trial, 1)
    model = method.attach(base_of(trial))
    optimizer = method.build_optimizer(model, trial.optim)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert {r for n, r in rates.items() if "lora_A" in n} == {1e-3}
    assert {r for n, r in rates.items() if "lora_B" in n} == {16e-3}
    assert {r for n, r in rates.items() if "magnitude" in n} == {16e-3}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())


def test_rslora_scales_by_the_square_root_of_the_rank(tiny_llama: Path) -> None:
    trial = trial_of(tiny_llama, {"type": "lora", "rank": 4, "alpha": 8, "rslora": True})
    model = build_method(trial, 1).attach(base_of(trial))
    layers = [m for m in model.modules() if hasattr(m, "scaling") and isinstance(m.scaling, dict)]
    assert layers
    assert {layer.scaling["default"] for layer in layers} == {4.0}


@pytest.mark.parametrize("rank", [4, 48, 200], ids=["", "above some layers' widths", "above all"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_change_the_base_export_for_the_unchanged_base(
    init: str, rank: int, tiny_llama: Path, tmp_path: Path
) -> None:
    trial = trial_of(tiny_llama, {"type": "lora", "rank": rank, "init": init}, learning_rate=1e-3)
    method, model, _, base = steps(trial, 3)
    method.export(model, base, tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        trained = model.eval()(ids).logits
        untouched = fresh(ids).logits
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)(ids).logits
        ours = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path)(ids).logits
    assert (trained - untouched).abs().max() > 1e-3
    torch.testing.assert_close(loaded, trained, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(ours, loaded)


def test_galore_equals_galore_torch() -> None:
    """Our optimiser around the projection against the paper authors' own, over two projections and with decay."""
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(24, 40, bias=False), torch.nn.Linear(24, 40, bias=False)
    theirs.load_state_dict(ours.state_dict())
    group = {"rank": 6, "scale": 0.5}
    mine = ProjectedAdamW(
        [{"params": ours.parameters(), **group, "interval": 4, "weight_decay": 0.0, "projected_decay": 0.1}],
        lr=1e-2, eps=1e-12,
    )  # fmt: skip
    reference = GaLoreAdamW(
        [{"params": theirs.parameters(), **group, "update_proj_gap": 4, "proj_type": "std", "weight_decay": 0.1}],
        lr=1e-2, eps=1e-12, no_deprecation_warning=True,
    )  # fmt: skip
    for step in range(10):
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(step))
        for layer, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-6, rtol=1e-5)
    assert mine.state[ours.weight]["exp_avg"].shape == (40, 6), "moments live in the projection"


@pytest.mark.parametrize(("rank", "dtype", "apart"), [(16, torch.float32, 1e-3), (64, torch.uint8, 0.15)])
def test_galore_8bit_follows_32bit(rank: int, dtype: torch.dtype, apart: float) -> None:
    """bitsandbytes keeps tensors below 4,096 elements in 32 bits: those must agree closely, 8-bit ones nearly."""
    torch.manual_seed(0)
    plain, eight = torch.nn.Linear(96, 128, bias=False), torch.nn.Linear(96, 128, bias=False)
    eight.load_state_dict(plain.state_dict())
    start = plain.weight.detach().clone()
    for layer, kind in ((plain, ProjectedAdamW), (eight, ProjectedAdamW8bit)):
        options = {"rank": rank, "interval": 5, "scale": 1.0, "weight_decay": 0.0, "projected_decay": 0.0}
        optimizer = kind([{"params": list(layer.parameters()), **options}], lr=1e-3)
        for step in range(12):
            draw = torch.Generator().manual_seed(step)
            (layer(torch.randn(256, 96, generator=draw)) * torch.randn(256, 128, generator=draw)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    state = optimizer.state[eight.weight]
    assert state["state1"].dtype == dtype
    assert state["state1"].shape == (128, rank)
    assert (plain.weight - eight.weight).norm() < apart * (plain.weight - start).norm()


def test_galore_layerwise_equals_one_step_at_the_end(tiny_llama: Path) -> None:
    results = []
    for layerwise in (False, True):
        method = {"type": "galore", "rank": 8, "interval": 2, "layerwise": layerwise}
        trial = trial_of(tiny_llama, method, learning_rate=1e-3, clip_norm=None)
        _, model, _, _ = steps(trial, 4)
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=1e-5)


def test_galore_layerwise_frees_each_gradient(tiny_llama: Path) -> None:
    trial = trial_of(tiny_llama, {"type": "galore", "rank": 8, "layerwise": True}, clip_norm=None)
    method = build_method(trial, 1)
    model = method.attach(base_of(trial))
    method.build_optimizer(model, trial.optim)
    loss_of(model).backward()
    assert all(p.grad is None for p in model.parameters())


def test_galore_resumes_through_a_weights_only_load(tiny_llama: Path, tmp_path: Path) -> None:
    trial = trial_of(tiny_llama, {"type": "galore", "rank": 8, "interval": 10}, learning_rate=1e-3)
    method, model, optimizer, _ = steps(trial, 3)
    torch.save(method.get_optimizer_state(optimizer), tmp_path / "state.pt")
    again, twin = build_method(trial, 6), copy.deepcopy(model)
    base = base_of(trial)
    again.attach(base)
    base.model.load_state_dict(twin.state_dict())
    resumed = again.build_optimizer(base.model, trial.optim)
    again.load_optimizer_state(resumed, torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, 6):
        for m, o in ((model, optimizer), (base.model, resumed)):
            loss_of(m, step).backward()
            o.step()
            o.zero_grad()
    for a, b in zip(model.parameters(), base.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adalora_ends_with_its_budget_unevenly_spread(tiny_llama: Path) -> None:
    method = {"type": "adalora", "initial_rank": 8, "target_rank": 3, "interval": 2}
    trial = trial_of(tiny_llama, method, learning_rate=5e-3)
    _, model, _, _ = steps(trial, 30)
    ranks = [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]
    assert sum(ranks) <= 3 * len(ranks), "the budget holds"
    assert len(set(ranks)) > 1, "layers differ in rank"


def test_adalora_refuses_a_run_too_short_to_adapt(tiny_llama: Path) -> None:
    trial = trial_of(tiny_llama, {"type": "adalora", "interval": 10})
    with pytest.raises(ValueError, match=r"method\.interval=10"):
        build_method(trial, 12).attach(base_of(trial))


def test_lisa_trains_few_layers_and_frees_the_moments_of_those_that_leave(tiny_model: Callable[..., Path]) -> None:
    trial = trial_of(tiny_model("qwen"), {"type": "lisa", "num_layers": 1, "interval": 2}, learning_rate=1e-3)
    base = base_of(trial)
    method = build_method(trial, 40)
    model = method.attach(base)
    optimizer = method.build_optimizer(model, trial.optim)
    elements: set[int] = set()
    drawn = set()
    for step in range(24):
        method.before_step(model, optimizer, step)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        training = {i for i, layer in enumerate(method._layers) for p in layer.parameters() if p.requires_grad}
        assert len(training) == 1
        drawn |= training
        elements.add(sum(s["exp_avg"].numel() for s in optimizer.state.values()))
    assert drawn == {0, 1}, "both layers had their turn"
    one_layer = sum(p.numel() for p in method._layers[0].parameters())
    ends = 2 * model.get_input_embeddings().weight.numel()
    assert elements == {one_layer + ends}, "moments of one layer, the embedding and the head; never more"


def test_lisa_draws_the_same_after_a_resume(tiny_llama: Path) -> None:
    trial = trial_of(tiny_llama, {"type": "lisa", "num_layers": 1, "interval": 3})
    draws = []
    for first in (0, 7):
        base = base_of(trial)
        method = build_method(trial, 20)
        model = method.attach(base)
        optimizer = method.build_optimizer(model, trial.optim)
        seen = {}
        for step in range(first, 20):
            method.before_step(model, optimizer, step)
            seen[step] = tuple(p.requires_grad for p in model.parameters())
        draws.append(seen)
    assert {k: v for k, v in draws[0].items() if k >= 7} == draws[1]


def test_target_modules_that_match_nothing_are_named(tiny_llama: Path) -> None:
    for targets, message in ((["q_prj"], "q_prj"), ("nothing.*", "pattern"), ("(", "regular expression")):
        trial = trial_of(tiny_llama, {"type": "lora", "target_modules": targets})
        with pytest.raises(ValueError, match=message):
            build_method(trial, 1).attach(base_of(trial))


def test_a_pattern_limits_the_adapter_to_some_layers(tiny_llama: Path) -> None:
    trial = trial_of(tiny_llama, {"type": "lora", "target_modules": r"model\.layers\.1\..*"})
    model = build_method(trial, 1).attach(base_of(trial))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7
    assert all(".layers.1." in name for name in trained)


def test_quantisation_is_a_knob_of_its_own(tiny_llama: Path) -> None:
    assert isinstance(trial_of(tiny_llama, {"type": "lora"}).quantization, NoQuantization)
