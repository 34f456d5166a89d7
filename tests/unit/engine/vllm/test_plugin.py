"""vLLM's plug-in without vLLM: its arithmetic against PEFT's DoRA, and which names it takes for one module."""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn

from rankloom.engine.vllm.plugin.rankloom_vllm.dora import compute_factors, scale_rows, sum_squares
from rankloom.engine.vllm.plugin.rankloom_vllm.names import match_modules
from rankloom.engine.vllm.plugin.rankloom_vllm.register import _read_columns, _take_magnitudes, register
from rankloom.engine.vllm.server import PLUGINS

KNOWN = [
    f"language_model.model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "k_proj", "o_proj")
]
KNOWN += ["vision_tower.layers.0.self_attn.q_proj", "lm_head"]


@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_a_mixed_batch_are_those_of_peft(bias: bool) -> None:
    """Slot 0 is DoRA, slot 1 a LoRA, -1 the base; 1,500 inputs are read in three parts."""
    torch.manual_seed(0)
    linear = nn.Linear(1500, 24, bias=bias)
    config = peft.LoraConfig(r=6, lora_alpha=9, use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(linear), config)
    layer = model.base_model.model[0]
    layer.lora_B.default.weight.data.normal_(std=0.1)
    magnitudes = layer.lora_magnitude_vector.default.weight.data.mul_(1 + torch.rand(24))
    a, b = layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach() * 9 / 6
    x, slots = torch.randn(5, 1500), torch.tensor([0, 1, -1, 0, 7])
    weight = linear.weight.detach()
    halves = [(a, b[:10]), (a, b[10:])]
    factors = compute_factors(magnitudes, sum_squares(lambda begin, end: weight[:, begin:end], halves, 1500))
    table = torch.stack([factors, torch.ones(24), torch.ones(24)])
    shifts = None
    if bias:
        shifts = torch.zeros(3, 24)
        shifts[0] = linear.bias.detach() * (1 - factors)
    y = (linear(x) + x @ a.T @ b.T * (slots == 0).unsqueeze(1)).detach()
    found, expected = scale_rows(y, slots, table, shifts), model(x).detach()
    torch.testing.assert_close(found[[0, 3]], expected[[0, 3]], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[[1, 2, 4]], y[[1, 2, 4]])
    assert not torch.allclose(y[[0, 3]], expected[[0, 3]], atol=1e-2)


def test_a_row_of_zeros_has_norm_one_and_bf16_is_rounded_once() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    nothing = [(torch.zeros(1, 2), torch.zeros(2, 1))]
    squares = sum_squares(lambda begin, end: weight[:, begin:end], nothing, 2)
    assert compute_factors(torch.tensor([10.0, 7.0]), squares).tolist() == [2, 7]
    y = torch.tensor([[1.0, 3.0]]).bfloat16()
    factors = torch.tensor([[1.003, 1.003]])  # bf16 has none between 1 and 1.0078
    shifts = torch.tensor([[0.005, 0.0]])
    both = scale_rows(y, torch.tensor([0]), torch.cat([factors, factors]), torch.cat([shifts, shifts]))
    assert both.tolist() == [[1.0078125, 3.015625]]
    assert both.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.1.self_attn.q_proj",  # vLLM's own
        "model.language_model.layers.1.self_attn.q_proj",  # of transformers' wrapper
        "model.layers.1.self_attn.q_proj",  # of the language model alone
        "base_model.model.model.language_model.layers.1.self_attn.q_proj",
    ],
)
def test_a_wrapped_name_is_that_of_one_module(name: str) -> None:
    assert match_modules([name], KNOWN) == {name: "language_model.model.layers.1.self_attn.q_proj"}
    alone = [known.removeprefix("language_model.") for known in KNOWN]
    assert match_modules([name], alone) == {name: "model.layers.1.self_attn.q_proj"}


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["model.layers.2.self_attn.q_proj"], r"no place .*none of them applied.*layers\.2\.self_attn\.q_proj; it"),
        (["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"], r"for 1 .*1 others.*0\.mlp\.up_proj"),
        (["layers.0.self_attn.v_proj"], r"v_proj"),
        (["visual.layers.0.self_attn.q_proj"], "no place"),
        ([f"model.layers.{i}.mlp.up_proj" for i in range(9)], "and 3 more"),
        (["model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"], "under two names"),
    ],
)  # fmt: skip
def test_what_is_not_a_module_is_refused_by_its_name(names: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        match_modules(names, KNOWN)


def test_a_name_that_two_modules_could_have_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for 1"):
        match_modules(["layers.0.q_proj"], ["model.layers.0.q_proj", "text_model.layers.0.q_proj"])


def test_modules_that_another_process_holds_are_left_to_it() -> None:
    names = ["model.language_model.layers.7.self_attn.q_proj", "model.layers.0.self_attn.q_proj"]
    found = match_modules(names, KNOWN, elsewhere=["language_model.model.layers.7"])
    assert found == {names[1]: "language_model.model.layers.0.self_attn.q_proj"}
    with pytest.raises(ValueError, match=r"layers\.70"):
        match_modules(["model.layers.70.self_attn.q_proj"], KNOWN, elsewhere=["language_model.model.layers.7"])


class _Layer:
    """As much of vLLM's layer for q, k and v as the plug-in asks for its part of the outputs, on two GPUs."""

    n_slices, output_slices, tp_size = 3, (4, 2, 2), 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def slice_lora_b(self, b: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        sizes = enumerate(self.output_slices)
        return [None if b[i] is None else b[i][self.rank * n : (self.rank + 1) * n] for i, n in sizes]  # type: ignore[index]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_gpu_takes_the_magnitudes_of_its_own_outputs(rank: int) -> None:
    q, v = torch.arange(8.0), torch.arange(100.0, 104.0)
    found = _take_magnitudes(_Layer(rank), [q, None, v])
    expected = [*q[rank * 4 : rank * 4 + 4].tolist(), *v[rank * 2 : rank * 2 + 2].tolist()]
    assert found[[0, 1, 2, 3, 6, 7]].tolist() == expected
    assert found[4:6].isnan().all()  # k is a plain LoRA, of factor 1


@pytest.mark.parametrize("readable", [True, False])
def test_weights_are_read_as_they_act(readable: bool) -> None:
    """Quantised ones, or those that a library keeps in a layout of its own, are applied to one input at a time."""
    weight = torch.randn(3, 5)
    held = weight if readable else torch.empty(0)
    method = SimpleNamespace(apply=lambda _base, x, _bias: x @ weight.T)
    layer = SimpleNamespace(
        base_layer=SimpleNamespace(weight=held), output_slices=(1, 2), input_size=5, device="cpu",
        lora_config=SimpleNamespace(lora_dtype=torch.float32), _get_quant_method=lambda: method,
    )  # fmt: skip
    assert torch.equal(_read_columns(layer, 1, 4), weight[:, 1:4])


def test_vllm_finds_the_plug_in_in_its_folder() -> None:
    (found,) = distributions(path=[str(PLUGINS)])
    (entry,) = found.entry_points.select(group="vllm.general_plugins")
    assert (found.metadata["Name"], entry.name, entry.module) == ("rankloom-vllm", "rankloom", "rankloom_vllm.register")


def test_without_a_known_vllm_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()
    assert "does not know this vLLM" in caplog.text
