"""Packed rows = padded rows: logits and gradients, on every architecture, at every mix of lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from rankloom import kernels
from rankloom.training.fused.attention import choose_attention, compute_logits, use_packed_attention
from rankloom.training.fused.packing import Attention, Example, lay_out, pack

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
    model: PreTrainedModel, examples: list[Example], attention: Attention
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and their loss's gradient on the first layer's attention input."""
    weight = next(p for n, p in model.named_parameters() if "q_proj.weight" in n or "c_attn.weight" in n)
    weight.requires_grad_(True)
    packed = pack(examples, attention, pad_id=0, device=CPU)
    with use_packed_attention(model, packed):
        logits_MV = compute_logits(model, packed)
        loss = (F.cross_entropy(logits_MV, packed.targets_M, reduction="none") * packed.weights_M).sum()
        (gradient,) = torch.autograd.grad(loss, [weight])
    weight.requires_grad_(False)
    return logits_MV.detach(), gradient


@pytest.mark.parametrize("attention", ["buckets", "rows"])
@pytest.mark.parametrize("architecture", ["llama", "qwen", "gpt2"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_equals_padded(
    architecture: str, lengths: list[int], attention: Attention, tiny_model: Callable[..., Path]
) -> None:
    model = model_of(tiny_model(architecture))
    examples = examples_of(lengths)
    expected, expected_gradient = result_of(model, examples, "padded")
    found, gradient = result_of(model, examples, attention)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_rows_as_they_lie_are_for_gpus(tiny_llama: Path) -> None:
    assert choose_attention(model_of(tiny_llama), 0) == "buckets"
    with kernels.everywhere():
        assert choose_attention(model_of(tiny_llama), 0) == "rows"


@pytest.mark.parametrize("attention", ["buckets", "rows"])
def test_a_sliding_window_is_kept(attention: Attention) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    assert choose_attention(model, 0) == "buckets"
    examples = examples_of([20, 5, 90])
    expected, _ = result_of(model, examples, "padded")
    found, _ = result_of(model, examples, attention)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.config.sliding_window = None
    without, _ = result_of(model, examples, attention)
    assert not torch.allclose(without, expected, atol=1e-2)  # the window was felt


@pytest.mark.parametrize("attention", ["buckets", "rows"])
def test_values_of_one_row_never_reach_another(attention: Attention, tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    examples = examples_of([9, 4, 30, 80])
    packed = pack(examples, attention, pad_id=0, device=CPU)
    spoilt = int(examples[1].ids_T[2])
    kept = [e for e in range(4) if e != 1 and spoilt not in examples[e].ids_T]
    assert kept
    runs = []
    for value in (1.0, float("nan")):
        with torch.no_grad():
            model.get_input_embeddings().weight[spoilt] = value
            with use_packed_attention(model, packed):
                model.lm_head.weight = torch.nn.Parameter(torch.ones_like(model.lm_head.weight), requires_grad=False)
                runs.append(compute_logits(model, packed).split(packed.num_predicted))
    for e in kept:
        assert torch.equal(runs[0][e], runs[1][e])
    assert runs[1][1].isnan().any()


def test_a_model_that_can_not_be_packed_is_found_out(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    inner = model.model.layers[0].forward

    def mixing(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return inner(hidden_states + hidden_states.roll(1, dims=1), *args, **kwargs)  # type: ignore[no-any-return]

    model.model.layers[0].forward = mixing  # as a convolution along the sequence would
    assert choose_attention(model, 0) == "padded"
    eager = model_of(tiny_llama)
    eager.set_attn_implementation("eager")
    assert choose_attention(eager, 0) == "padded"


def test_layout_is_a_bijection_and_pads_with_the_rows_own_tokens() -> None:
    lengths = np.array([5, 70, 64, 200, 65, 2])
    buckets, places = lay_out(lengths)
    tokens_P, positions_N = (torch.from_numpy(places[name]) for name in ("tokens_P", "positions_N"))
    assert buckets == ((3, 64), (2, 70), (1, 200))
    assert torch.equal(tokens_P[positions_N], torch.arange(int(lengths.sum())))
    row_of_token = torch.from_numpy(np.repeat(np.arange(6), lengths))
    for rows, bucket in zip(([0, 2, 5], [1, 4], [3]), tokens_P.split([3 * 64, 2 * 70, 200]), strict=True):
        assert row_of_token[bucket].unflatten(0, (len(rows), -1)).unique(dim=1).flatten().tolist() == rows
