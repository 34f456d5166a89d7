"""What an adapter costs: weights counted once, quantised ones with their constants; measured beside a bank at work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rankloom.adapters.weights import load_adapter, load_beside
from rankloom.banks.bank import AdapterBank, SlotSpec
from rankloom.config.method import DoraConfig, LoraConfig
from rankloom.config.model import ModelConfig, Nf4, NoQuantization
from rankloom.data.render import Row
from rankloom.evals.costs import count_weight_bytes, measure_costs
from rankloom.hosts.reports import round_costs
from rankloom.models import find_target_linears, load_base

ROWS = [Row([i + 5 for i in range(9)], [1.0] * 9, 4, "")] * 8
CPU = torch.device("cpu")


@pytest.mark.parametrize("quantization", [NoQuantization(), Nf4()], ids=["none", "nf4"])
@pytest.mark.parametrize("method", [LoraConfig(rank=4), DoraConfig(rank=4)], ids=["lora", "dora"])
def test_costs_are_measured_on_a_copy_beside_the_bank(
    tiny_model: Callable[..., Path], quantization: NoQuantization | Nf4, method: LoraConfig | DoraConfig, tmp_path: Path
) -> None:
    base = load_base(ModelConfig(id=str(tiny_model("llama"))), quantization, device=CPU, dtype=torch.float32)
    before = count_weight_bytes(base.model)
    bank = AdapterBank(base.model, find_target_linears(base.model, "all-linear"), 2, 8, with_magnitudes=True)
    bank.attach(0, SlotSpec.from_method(method, base.model, seed=0))
    for site in bank.sites.values():
        torch.nn.init.normal_(site.b_KOR.data[0, :, :4], std=0.1)
    bank.write(0, tmp_path, base.id)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = base.model(ids).logits

    adapted = load_beside(base.model, tmp_path)

    adapter = sum(
        tensor.numel() * tensor.element_size() for tensor in load_file(tmp_path / "adapter_model.safetensors").values()
    )
    assert count_weight_bytes(adapted) == before + adapter
    costs = measure_costs(adapted, ROWS, pad_id=0, names=["memory_bytes", "latency_ms"])
    assert costs["memory_bytes"] == before + adapter
    assert costs["latency_ms"] > 0
    assert round_costs({"memory_bytes": 1234, "latency_ms": 12.345}, costs) == {
        "memory_bytes": 1234.0,
        "latency_ms": 12.0,
    }
    assert round_costs({"memory_bytes": 1234, "latency_ms": None}, costs) == {"memory_bytes": 1234.0}
    assert measure_costs(adapted, ROWS, pad_id=0, names=["memory_bytes"]).keys() == {"memory_bytes"}
    torch.testing.assert_close(base.model(ids).logits, plain)  # the base and its bank are as they were
    beside = adapted(ids).logits
    bank.remove()
    torch.testing.assert_close(beside, load_adapter(base.model, tmp_path)(ids).logits)
    assert (beside - plain).abs().max() > 1e-3


def test_quantised_weights_count_with_their_constants(tiny_model: Callable[..., Path]) -> None:
    held = {}
    for quantization in (NoQuantization(), Nf4(double=False), Nf4()):
        base = load_base(ModelConfig(id=str(tiny_model("llama"))), quantization, device=CPU, dtype=torch.float32)
        held[quantization] = count_weight_bytes(base.model)
    linears = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # weights; in blocks of 64 each with a constant in fp32
    saved = held[NoQuantization()] - held[Nf4(double=False)]
    codes = 14 * 16 * 4  # each linear's code book
    assert saved == 4 * linears - linears // 2 - 4 * linears // 64 - codes
    assert held[Nf4()] != held[Nf4(double=False)]
