"""Fused norms, rotations and activations give a model's own logits and gradients; what differs from Llama stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from rankloom import kernels
from rankloom.config import parse
from rankloom.config.model import ModelConfig, NoQuantization
from rankloom.models import load_base
from rankloom.models.fused import fuse

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference, relative to the largest value. Fused operations round once, a model's own after each step."""


def results(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and the gradient of the embeddings."""
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((logits.float() * weights).sum(), embeddings)
    return logits.detach().float(), gradient.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen", "mixture"])
def test_a_fused_model_gives_its_own_logits_and_gradients(
    architecture: str, dtype: torch.dtype, tiny_model: Callable[..., Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=dtype).eval()
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = results(model, ids)
    fuse(model)
    for found, own in zip(results(model, ids), expected, strict=True):
        assert (found - own).abs().max() <= TOLERANCE[dtype] * own.abs().max()


def test_a_loaded_base_is_fused_where_the_fast_path_is_used(tiny_llama: Path) -> None:
    config, device = parse(ModelConfig, {"id": str(tiny_llama)}), torch.device("cpu")
    plain = load_base(config, NoQuantization(), device=device).model
    assert "forward" not in vars(plain.model.layers[0])
    with kernels.everywhere():
        model = load_base(config, NoQuantization(), device=device).model
    layer = model.model.layers[0]
    parts = [layer, layer.mlp, layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm, model.model.norm]
    assert all(isinstance(vars(part)["forward"], MethodType) for part in parts)


def test_a_norm_that_trains_gets_its_gradient(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    fuse(model)
    loss = model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "norm" in n)


def test_norms_and_activations_of_another_kind_keep_their_forward() -> None:
    size = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    model = Gemma2ForCausalLM(Gemma2Config(**size, num_attention_heads=4, num_key_value_heads=2)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = results(model, ids)
    fuse(model)
    layer = model.model.layers[0]
    assert "forward" in vars(layer.self_attn)
    assert not any("forward" in vars(part) for part in (layer, layer.mlp, layer.input_layernorm, model.model.norm))
    for found, own in zip(results(model, ids), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)
