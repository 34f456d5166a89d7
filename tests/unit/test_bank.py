"""The adapter bank against PEFT: initial values, forwards, gradients and folders, for plain, Conv1D and NF4 bases."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankloom.adapters.bank import AdapterBank, SlotSpec
from rankloom.adapters.weights import load_adapter
from rankloom.config.base import parse
from rankloom.config.method import DoraConfig, LoraConfig
from rankloom.config.trial import TrialConfig
from rankloom.errors import IncompatibleError, RegistryError
from rankloom.models import Base, find_target_linears, load_base

CPU = torch.device("cpu")
LENGTH = 7
BASES = [("llama", "none"), ("qwen", "none"), ("gpt2", "none"), ("llama", "nf4")]
"""Plain with and without biases, Conv1D, NF4."""
ATTENTION = {"llama": ["q_proj", "v_proj"], "qwen": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}

Opener = Callable[[str, str], Base]


@pytest.fixture
def open_base(tiny_model: Callable[..., Path]) -> Opener:
    def opened(architecture: str, quantization: str) -> Base:
        tree = {"name": "t", "model": {"id": str(tiny_model(architecture))}, "quantization": quantization}
        trial = parse(TrialConfig, tree)
        return load_base(trial.model, trial.quantization, device=CPU)

    return opened


def specs_of(base: Base, architecture: str) -> list[SlotSpec]:
    """Members of different ranks, scalings, targets and kinds."""
    methods: list[LoraConfig | DoraConfig] = [
        LoraConfig(rank=4, alpha=8),
        DoraConfig(rank=8, alpha=8),
        LoraConfig(rank=2, alpha=16, rslora=True, init="gaussian", target_modules=ATTENTION[architecture]),
        DoraConfig(rank=3, alpha=4, target_modules=ATTENTION[architecture]),
    ]
    return [SlotSpec.of(method, base.model, seed) for seed, method in enumerate(methods)]


def bank_of(base: Base, *, num_slots: int = 4, max_rank: int = 8, with_magnitudes: bool = True) -> AdapterBank:
    targets = find_target_linears(base.model, "all-linear")
    return AdapterBank(base.model, targets, num_slots, max_rank, with_magnitudes=with_magnitudes)


def moved(bank: AdapterBank, slot: int) -> None:
    """Away from the initial values, where B is zero and DoRA's factors are one."""
    generator = torch.Generator().manual_seed(100 + slot)
    state = bank.state(slot)
    for values in state.values():
        values.add_(torch.randn(values.shape, generator=generator) * 0.05)
    bank.load_state(slot, state)


def rows_of(bank: AdapterBank, rows: list[int], *, first: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """Token ids [B, T] of some rows of each slot (after `first` rows of none), each token's slot, each slot's tokens."""
    generator = torch.Generator().manual_seed(3)
    ids_BT = torch.randint(5, 200, (first + sum(rows), LENGTH), generator=generator)
    slots = [-1] * first + [slot for slot, count in enumerate(rows) for _ in range(count)]
    return ids_BT, torch.tensor(slots).repeat_interleave(LENGTH), [count * LENGTH for count in rows]


def parted(tensor: Tensor, rows: list[int], slot: int, *, first: int = 0) -> Tensor:
    start = first + sum(rows[:slot])
    return tensor[start : start + rows[slot]]


def peft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """In the bank's spelling."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            site = name.removeprefix("base_model.model.")
            found[f"{site}.a"] = module.lora_A["default"].weight
            found[f"{site}.b"] = module.lora_B["default"].weight
            if "default" in module.lora_magnitude_vector:
                found[f"{site}.m"] = module.lora_magnitude_vector["default"].weight
    return found


@pytest.mark.parametrize(("architecture", "quantization"), BASES)
def test_initial_values_are_those_of_peft(architecture: str, quantization: str, open_base: Opener) -> None:
    bank = bank_of(open_base(architecture, quantization))
    specs = specs_of(open_base(architecture, quantization), architecture)
    for slot, spec in enumerate(specs):
        bank.attach(slot, spec)
    for slot, spec in enumerate(specs):
        base = open_base(architecture, quantization)
        config = peft.LoraConfig(
            r=spec.rank, lora_alpha=spec.alpha, use_rslora=spec.rslora, use_dora=spec.dora,
            target_modules=list(spec.targets), init_lora_weights=True if spec.init == "default" else "gaussian",
            fan_in_fan_out=architecture == "gpt2", task_type="CAUSAL_LM",
        )  # fmt: skip
        torch.manual_seed(spec.seed)
        expected = peft_parameters(peft.get_peft_model(base.model, config))
        found = bank.state(slot)
        assert found.keys() == expected.keys()
        for name, values in found.items():
            if name.endswith(".m"):  # the norms are reached on another way
                torch.testing.assert_close(values, expected[name].data)
            else:
                assert torch.equal(values, expected[name]), name


@pytest.mark.parametrize(("architecture", "quantization"), BASES)
@pytest.mark.parametrize(("rows", "first"), [([2, 2, 2, 2], 0), ([1, 3, 0, 2], 2)])
def test_mixed_rows_are_what_peft_gives_each(
    architecture: str, quantization: str, rows: list[int], first: int, open_base: Opener, tmp_path: Path
) -> None:
    base = open_base(architecture, quantization)
    specs = specs_of(base, architecture)
    bank = bank_of(base)
    for slot, spec in enumerate(specs):
        bank.attach(slot, spec)
        moved(bank, slot)
        bank.write(slot, tmp_path / str(slot), "base")
    ids_BT, slots_N, counts_K = rows_of(bank, rows, first=first)
    with bank.routed(slots_N, counts_K):
        logits_BTV = base.model(input_ids=ids_BT).logits
        logits_BTV.float().log_softmax(-1).select(-1, 3).sum().backward()
    plain = open_base(architecture, quantization)
    with torch.no_grad():
        expected = plain.model(input_ids=ids_BT[:first]).logits if first else logits_BTV[:0]
    torch.testing.assert_close(logits_BTV[:first], expected, atol=1e-4, rtol=1e-4)
    for slot, spec in enumerate(specs):
        model = peft.PeftModel.from_pretrained(plain.model, tmp_path / str(slot), is_trainable=True)
        if rows[slot]:
            alone_BTV = model(input_ids=parted(ids_BT, rows, slot, first=first)).logits
            torch.testing.assert_close(
                parted(logits_BTV, rows, slot, first=first), alone_BTV, atol=1e-4, rtol=1e-4
            )
            alone_BTV.float().log_softmax(-1).select(-1, 3).sum().backward()
        for name, parameter in peft_parameters(model).items():
            site, part = bank.sites[name.rsplit(".", 1)[0]], name[-1]
            stack = {"a": site.a_KRI, "b": site.b_KOR, "m": site.m_KO}[part]
            assert stack is not None
            assert stack.grad is not None
            gradient = stack.grad[slot]
            if part != "m":  # what pads the rank
                assert not (gradient[spec.rank :] if part == "a" else gradient[:, spec.rank :]).any()
                gradient = gradient[: spec.rank] if part == "a" else gradient[:, : spec.rank]
            expected = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad
            assert (gradient - expected).norm() <= 1e-4 * expected.norm(), name
        for name, site in bank.sites.items():
            if name not in spec.targets and site.b_KOR.grad is not None:
                assert not site.b_KOR.grad[slot].any()
        model.unload()
