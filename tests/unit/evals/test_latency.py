"""Latency is a positive time of real decode steps, for prompts of any length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from rankloom.data.render import Row
from rankloom.evals.latency import BATCH_SIZE, NUM_STEPS, NUM_WARMUP, measure_latency


def row(length: int, prompt: int) -> Row:
    return Row([i % 200 + 5 for i in range(length)], [1.0] * length, prompt, "")


@pytest.mark.parametrize("rows", [[row(9, 4)], [row(512, 508)] * 9, [row(20, 0)] * 3], ids=["one", "full", "text"])
def test_decodes_one_token_a_step_with_a_cache(tiny_model, rows: list[Row]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"))  # fails beyond its 512 positions
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    found = measure_latency(model, rows, pad_id=0)
    assert found is not None
    assert found.latency_ms > 0
    assert found.generated_tokens_per_s > 0
    assert shapes.count((1, 1)) >= NUM_WARMUP + NUM_STEPS
    assert shapes.count((BATCH_SIZE, 1)) >= NUM_WARMUP + NUM_STEPS


def test_a_model_without_a_kv_cache_has_none() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert measure_latency(mamba, [row(9, 4)], pad_id=0) is None


def test_units(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    found = measure_latency(model, [row(9, 4)] * 8, pad_id=0)
    assert found is not None
    # a step of 8 rows takes at least about as long as one of 1 row and, cached, far less than 50 times that
    step_of_8_ms = 1000 * BATCH_SIZE / found.generated_tokens_per_s
    assert 0.2 * found.latency_ms < step_of_8_ms < 50 * found.latency_ms
