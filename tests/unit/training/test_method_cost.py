"""A method's cost alone: its memory by part against what its numbers make, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rankloom.config import TrialConfig, parse
from rankloom.registry.scorecard import MethodCost
from rankloom.training.method_cost import measure_cost

FP32 = 4


def cost_of(model: Path, **changed: Any) -> MethodCost:
    tree = {
        "name": "t",
        "model": {"id": str(model)},
        "data": {"max_train_rows": 64},
        "optim": {"batch_size": 8},
        "budget": {"steps": 12},
        "compute": {"device": "cpu"},
    }
    return measure_cost(parse(TrialConfig, tree | changed))


def test_lora_keeps_gradients_and_two_moments_of_its_adapter(tiny_llama: Path) -> None:
    base = cost_of(tiny_llama, method={"type": "lora", "rank": 1})
    cost = cost_of(tiny_llama, method={"type": "lora", "rank": 9})
    grown = FP32 * (cost.trainable_parameters - base.trainable_parameters)
    assert cost.weight_bytes - base.weight_bytes == grown
    assert cost.gradient_bytes == FP32 * cost.trainable_parameters
    assert cost.optimizer_bytes == pytest.approx(2 * FP32 * cost.trainable_parameters, rel=0.02)  # and step counters
    held = cost.weight_bytes + cost.optimizer_bytes
    assert held + cost.activation_bytes < cost.peak_bytes < 2 * (held + cost.gradient_bytes + cost.activation_bytes)
    assert cost.tokens_per_s > 0
    assert cost.num_steps == 4


def test_full_trains_all_and_galore_keeps_less_of_it(tiny_llama: Path) -> None:
    full = cost_of(tiny_llama, method={"type": "full"})
    galore = cost_of(tiny_llama, method={"type": "galore", "rank": 4})
    layerwise = cost_of(
        tiny_llama, method={"type": "galore", "rank": 4, "layerwise": True}, optim={"batch_size": 8, "clip_norm": None}
    )
    assert full.weight_bytes == galore.weight_bytes
    assert full.weight_bytes == pytest.approx(FP32 * full.trainable_parameters, rel=1e-3)  # and buffers
    assert full.gradient_bytes == galore.gradient_bytes == FP32 * full.trainable_parameters
    assert full.optimizer_bytes == pytest.approx(2 * FP32 * full.trainable_parameters, rel=0.02)
    assert galore.optimizer_bytes < 0.7 * full.optimizer_bytes
    assert layerwise.gradient_bytes < 0.5 * galore.gradient_bytes
    assert layerwise.peak_bytes < galore.peak_bytes


def test_checkpointing_keeps_fewer_activations(tiny_llama: Path) -> None:
    plain = cost_of(tiny_llama)
    recomputed = cost_of(tiny_llama, compute={"device": "cpu", "activation_checkpointing": True})
    halves = cost_of(tiny_llama, optim={"batch_size": 8, "accumulation": 2})
    assert recomputed.activation_bytes < 0.8 * plain.activation_bytes
    assert halves.activation_bytes < 0.7 * plain.activation_bytes


def test_a_quantised_base_is_smaller(tiny_llama: Path) -> None:
    plain, quantized = cost_of(tiny_llama), cost_of(tiny_llama, quantization="nf4")
    assert quantized.weight_bytes < plain.weight_bytes
    assert quantized.gradient_bytes == plain.gradient_bytes
