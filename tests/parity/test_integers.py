"""On a real model, 16-bit integers give the logits of fp32, to fp32's own rounding; fp64 is the reference."""

from __future__ import annotations

import copy

import pytest
import torch

from rankloom.banks.rounding import round_adapter
from rankloom.banks.served_adapter import Factors, ServedAdapter
from rankloom.config.model import ModelConfig, NoQuantization
from rankloom.engine.adapter_cache.loading import NOISE
from rankloom.engine.attention import SequenceChunk
from rankloom.engine.kv_cache import KvCache
from rankloom.engine.model_runner import ModelRunner
from rankloom.models import get_linear_widths, is_linear, load_base

RANK = 16
PROMPT = "What should I do about a lost card at my bank?\nAnswer: you should"


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.005, 0.01, 0.02])
def test_integers_give_the_logits_of_fp32(strength: float) -> None:
    base = load_base(ModelConfig(), NoQuantization(), device=torch.device("cpu"))
    precise = copy.deepcopy(base.model).double()
    tokens, linears = base.tokenizer(PROMPT).input_ids, {}
    torch.manual_seed(0)
    for name, module in base.model.named_modules():
        if is_linear(module) and module is not base.model.get_output_embeddings():
            num_in, num_out = get_linear_widths(module)
            a_RI, b_RO = strength * torch.randn(RANK, num_in), strength * torch.randn(RANK, num_out)
            linears[name] = Factors(a_RI, b_RO, None, None)
            precise.get_submodule(name).weight.data += b_RO.T.double() @ a_RI.double()
    with torch.no_grad():
        expected = precise(torch.tensor([tokens])).logits[0, -1]
    runner, errors = ModelRunner(base.model), []
    adapter = ServedAdapter(linears, {}, {})
    rounded = round_adapter(adapter)
    assert all(factors.scale_R is not None for factors in rounded.linears.values())
    found = []
    for own in (adapter, rounded):
        runner.bank.admit(own)
        cache = KvCache(runner.shape, 64)
        cache.reserve("row", len(tokens))
        with torch.inference_mode():
            found.append(runner.forward(cache, [SequenceChunk("row", own, 0, tokens)], in_slots=False)[0])
        errors.append(float((found[-1] - expected).abs().max() / expected.abs().max()))
    print(f"\n{strength}: of the largest logit, fp32 is off by {errors[0]:.1e}, integers by {errors[1]:.1e}")
    assert errors[1] < 2 * errors[0] + 2e-6
    assert (found[1] - found[0]).abs().max() <= NOISE * torch.finfo(torch.float32).eps * found[0].abs().max()
