"""The loss with the head at trained positions alone equals the plain one; evaluation leaves no trace."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from rankloom.data.batching import Batch, collate
from rankloom.data.render import Row
from rankloom.errors import DataError
from rankloom.evals.loss import Loss, compute_labelled_loss, compute_token_loss

PAD = 0
ARCHITECTURES = ["llama", "qwen", "gpt2"]


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of 4 to 30 tokens; one of the trained tokens weighs a half."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        length = rng.randint(4, 30)
        prompt = rng.randint(1, length - 2)
        weights = [0.0] * prompt + [0.5] + [1.0] * (length - prompt - 1)
        rows.append(Row([rng.randrange(5, 300) for _ in range(length)], weights, prompt, ""))
    return rows


def plain_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Every position's logits, padding masked out of the attention."""
    logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.input_ids_BT[:, 1:].flatten(), reduction="none")
    return (losses * batch.loss_weights_BT[:, 1:].flatten()).sum() / batch.loss_weights_BT[:, 1:].sum()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_plain(model: torch.nn.Module, batch: Batch) -> None:
    plain = plain_loss(model, batch)
    expected = gradients(model, plain)
    loss_sum, weight_sum = compute_labelled_loss(model, batch)
    loss = loss_sum / weight_sum
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    assert any(g.abs().max() > 1e-3 for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_plain_loss_and_its_gradients(tiny_model, architecture: str) -> None:
    assert_equal_to_plain(load(tiny_model(architecture)), collate(make_rows(5), PAD))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_plain_loss_under_peft(tiny_model, architecture: str) -> None:
    targets = ["c_attn"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=architecture == "gpt2")
    assert_equal_to_plain(get_peft_model(load(tiny_model(architecture)), config).eval(), collate(make_rows(5), PAD))


def test_equals_the_plain_loss_under_activation_checkpointing(tiny_llama: Path) -> None:
    batch = collate(make_rows(5), PAD)
    model = load(tiny_llama)
    expected = gradients(model, plain_loss(model, batch))
    model.gradient_checkpointing_enable()
    model.train()  # transformers recomputes in train mode only; the tiny models have no dropout
    loss_sum, weight_sum = compute_labelled_loss(model, batch)
    found = gradients(model, loss_sum / weight_sum)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_runs_through_the_ddp_wrapper(tiny_llama: Path, tmp_path: Path) -> None:
    batch, model = collate(make_rows(3), PAD), load(tiny_llama)
    plain, _ = compute_labelled_loss(model, batch)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped, _ = compute_labelled_loss(torch.nn.parallel.DistributedDataParallel(model), batch)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(wrapped, plain)


def test_the_head_sees_the_trained_positions_alone(tiny_llama: Path) -> None:
    model, batch = load(tiny_llama), collate(make_rows(5), PAD)
    seen = []
    model.lm_head.register_forward_hook(lambda _module, _args, output: seen.append(output.shape[:-1].numel()))
    compute_labelled_loss(model, batch)
    assert seen == [int((batch.loss_weights_BT > 0).sum())]


def test_the_hook_is_gone_after_an_error(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    batch = collate([Row([7, 10_000, 9], [0.0, 1.0, 1.0], 1, "")], PAD)
    with pytest.raises(IndexError):
        compute_labelled_loss(model, batch)
    assert model(input_ids=torch.tensor([[7, 8, 9]])).logits.shape[:2] == (1, 3)
    assert not model.lm_head._forward_pre_hooks


def test_a_batch_without_trained_tokens_has_zero_loss_and_gradient(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    loss, weight = compute_labelled_loss(model, collate([Row([7, 8, 9], [0.0] * 3, 1, "")], PAD))
    found = gradients(model, loss)
    assert loss.item() == weight.item() == 0
    assert found
    assert all(g.abs().max() == 0 for g in found.values())


def test_token_loss_does_not_depend_on_the_batches(tiny_llama: Path) -> None:
    model, rows = load(tiny_llama), make_rows(11)
    expected = plain_loss(model, collate(rows, PAD)).item()
    for batch_size in (1, 4, 11):
        loss = compute_token_loss(model, rows, pad_id=PAD, batch_size=batch_size)
        assert loss.mean == pytest.approx(expected, rel=1e-5)
        assert loss.num_tokens == sum(w > 0 for row in rows for w in row.loss_weights[1:])
    assert loss.perplexity == pytest.approx(math.exp(expected), rel=1e-4)


def test_perplexity_of_a_diverged_model_is_infinite() -> None:
    assert Loss(1e4, 1).perplexity == math.inf


def test_evaluation_restores_modes_and_training_goes_on(tiny_llama: Path) -> None:
    model, rows = load(tiny_llama), make_rows(6)
    model.train()
    model.model.norm.eval()
    modes = [m.training for m in model.modules()]
    inside = []
    handle = model.model.register_forward_pre_hook(
        lambda module, _args: inside.append(module.training or torch.is_grad_enabled())
    )
    compute_token_loss(model, rows, pad_id=PAD, batch_size=4)
    handle.remove()
    assert inside == [False, False]
    assert [m.training for m in model.modules()] == modes
    loss, _ = compute_labelled_loss(model, collate(rows[:2], PAD))
    assert all(torch.isfinite(g).all() for g in gradients(model, loss).values())


def test_rows_that_train_nothing_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(DataError, match="none of the 1 rows"):
        compute_token_loss(load(tiny_llama), [Row([7, 8], [0.0, 0.0], 1, "")], pad_id=PAD, batch_size=1)
