"""Packed rows = padded rows: logits and gradients, on every architecture, at every mix of lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from rankloom.training.fused.packing import Example, can_pack, lay_out, logits, pack, packed_attention_on

CPU = torch.device("cpu")
LENGTHS = {
    "equal": [7, 7, 7],
    "short": [3, 12, 1, 30],
    "buckets": [5, 70, 64, 200, 65, 2],
    "alone": [19],
}  # fmt: skip


def model_of(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()


def examples_of(lengths: list[int], vocabulary: int = 256) -> list[Example]:
    random = np.random.default_rng(1)
    found = []
    for length in lengths:
        weights = random.integers(0, 2, length).astype(np.float32)
        weights[-1] = 1  # every row predicts something, but that of one token
        predicting = np.flatnonzero(weights[1:] > 0)
        found.append(Example(random.integers(0, vocabulary, length), predicting, weights[predicting + 1]))
    return found


def result_of(
    model: PreTrainedModel, examples: list[Example], padded_with: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and their loss's gradient on the first layer's attention input."""
    weight = next(p for n, p in model.named_parameters() if "q_proj.weight" in n or "c_attn.weight" in n)
    weight.requires_grad_(True)
    packed = pack(examples, padded_with=padded_with, device=CPU)
    with packed_attention_on(model, packed):
        logits_MV = logits(model, packed)
        loss = (F.cross_entropy(logits_MV, packed.targets_M, reduction="none") * packed.weights_M).sum()
        (gradient,) = torch.autograd.grad(loss, [weight])
    weight.requires_grad_(False)
    return logits_MV.detach(), gradient


@pytest.mark.parametrize("architecture", ["llama", "qwen", "gpt2"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_equals_padded(architecture: str, lengths: list[int], tiny_model: Callable[..., Path]) -> None:
    model = model_of(tiny_model(architecture))
    assert can_pack(model, 0)
    examples = examples_of(lengths)
    expected, expected_gradient = result_of(model, examples, padded_with=0)
    found, gradient = result_of(model, examples, padded_with=None)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_a_sliding_window_is_kept() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    assert can_pack(model, 0)
    examples = examples_of([20, 5, 90])
    expected, _ = result_of(model, examples, padded_with=0)
    found, _ = result_of(model, examples, padded_with=None)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.config.sliding_window = None
    without, _ = result_of(model, examples, padded_with=None)
    assert not torch.allclose(without, expected, atol=1e-2)  # the window was felt


def test_values_of_one_row_never_reach_another(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    examples = examples_of([9, 4, 30, 80])
    packed = pack(examples, padded_with=None, device=CPU)
    spoilt = int(examples[1].ids_T[2])
    kept = [e for e in range(4) if e != 1 and spoilt not in examples[e].ids_T]
    assert kept
    runs = []
    for value in (1.0, float("nan")):
        with torch.no_grad():
            model.get_input_embeddings().weight[spoilt] = value
            with packed_attention_on(model, packed):
                model.lm_head.weight = torch.nn.Parameter(torch.ones_like(model.lm_head.weight), requires_grad=False)
                runs.append(logits(model, packed).split(packed.num_predicted))
    for e in kept:
        assert torch.equal(runs[0][e], runs[1][e])
    assert runs[1][1].isnan().any()


def test_a_model_that_can_not_be_packed_is_found_out(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    inner = model.model.layers[0].forward

    def mixing(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return inner(hidden_states + hidden_states.roll(1, dims=1), *args, **kwargs)  # type: ignore[no-any-return]

    model.model.layers[0].forward = mixing  # as a convolution along the sequence would
    assert not can_pack(model, 0)
    eager = model_of(tiny_llama)
    eager.set_attn_implementation("eager")
    assert not can_pack(eager, 0)


def test_layout_is_a_bijection_and_pads_with_the_rows_own_tokens() -> None:
    lengths = np.array([5, 70, 64, 200, 65, 2])
    layout = lay_out(lengths, CPU)
    assert layout.buckets == ((3, 64), (2, 70), (1, 200))
    assert layout.tokens_P is not None
    assert layout.positions_N is not None
    assert torch.equal(layout.tokens_P[layout.positions_N], torch.arange(int(lengths.sum())))
    row_of_token = torch.from_numpy(np.repeat(np.arange(6), lengths))
    for rows, bucket in zip(([0, 2, 5], [1, 4], [3]), layout.tokens_P.split([3 * 64, 2 * 70, 200]), strict=True):
        assert row_of_token[bucket].unflatten(0, (len(rows), -1)).unique(dim=1).flatten().tolist() == rows
