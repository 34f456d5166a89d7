"""Forecasts of memory, held to what torch's profiler counts on a tiny model; and what `fit` makes of little memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rankloom import kernels
from rankloom.banks.groups import PADDED
from rankloom.config import TrialConfig, parse
from rankloom.data import load_data
from rankloom.errors import TrialError
from rankloom.kernels.cross_entropy import MOST_LOGITS
from rankloom.models import load_base, load_tokenizer
from rankloom.models.load import DTYPES
from rankloom.planning.forecast import read_outline_shape
from rankloom.planning.outline import open_outline
from rankloom.planning.plan import plan_trials
from rankloom.planning.rows import read_row_sizes
from rankloom.training import memory
from rankloom.training.fused.host import TrialHost
from rankloom.training.loop import TrainingLoop
from rankloom.training.memory import read_shape
from rankloom.training.memory_plan import CHUNKS, FP32, LASTING, ROUNDED, HostSize, Shape, fit_host, forecast_run
from rankloom.training.method_cost import measure_cost, measure_peak
from rankloom.training.run import run_trial
from rankloom.training.session import LocalSession

CPU = torch.device("cpu")
TOLERANCE = 0.25
"""Of hosts, and of the peak of mixtures."""
WITHIN = 0.1
"""Of dedicated runs."""


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that torch holds, of what it allocates meanwhile."""
    gc.collect()
    return measure_peak(call, CPU)


def trial_of(model: Path, **changed: Any) -> TrialConfig:
    tree = {
        "name": "t",
        "model": {"id": str(model)},
        "data": {"max_train_rows": 64},
        "method": {"type": "lora", "rank": 8},
        "optim": {"batch_size": 16},
        "budget": {"steps": 9},
        "eval": {"max_rows": 8},
    }
    return parse(TrialConfig, tree | changed)


@pytest.mark.parametrize(
    ("architecture", "quantization", "kind", "rank", "batch_size"),
    [
        ("llama", "none", "lora", 8, 32),
        ("llama", "none", "lora", 64, 32),
        ("llama", "none", "lora", 256, 1),
        ("llama", "none", "dora", 8, 32),
        ("llama", "nf4", "lora", 8, 32),
        ("gpt2", "none", "lora", 8, 32),
    ],
)
def test_a_hosts_forecast_is_its_peak(
    architecture: str, quantization: str, kind: str, rank: int, batch_size: int, tiny_model: Callable[..., Path]
) -> None:
    trial = trial_of(
        tiny_model(architecture), method={"type": kind, "rank": rank}, quantization=quantization,
        optim={"batch_size": batch_size},
    )  # fmt: skip
    base = load_base(trial.model, trial.quantization, device=CPU)
    data = load_data(trial.data, load_tokenizer(trial.model))
    host: list[TrialHost] = []
    size = HostSize(4, rank, 100_000, with_magnitudes=kind == "dora")

    def open_host() -> None:
        host.append(
            TrialHost(base, data, num_slots=4, max_rank=rank, token_budget=10**6, with_magnitudes=kind == "dora")
        )
        for k in range(4):
            host[0].admit(f"t{k}", trial)
        host[0].step()

    peak = peak_bytes(open_host)
    plan = host[0].last_plan
    assert plan is not None
    forecast = replace(size, token_budget=plan.num_tokens).count_bytes(read_shape(base, data))
    accumulated = FP32 * 4 * read_shape(base, data).count_adapter_numbers(rank, dora=kind == "dora")
    assert forecast - accumulated == pytest.approx(peak, rel=TOLERANCE)  # no step was under way


@pytest.mark.parametrize(
    ("dtype", "kind", "rank", "batch_size"),
    [("bf16", "lora", 8, 8), ("bf16", "lora", 128, 2), ("bf16", "dora", 8, 8), ("fp32", "lora", 8, 8)],
)
def test_a_hosts_forecast_is_its_peak_on_the_fast_path(
    dtype: str, kind: str, rank: int, batch_size: int, tmp_path: Path, make_tokenizer: Callable[..., Any]
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=1,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    trial = trial_of(
        tmp_path, method={"type": kind, "rank": rank}, optim={"batch_size": batch_size},
        data={"max_train_rows": 64, "template": "plain"},
    )  # fmt: skip
    data, dora, precision = load_data(trial.data, load_tokenizer(trial.model)), kind == "dora", DTYPES[dtype]
    hosts: list[TrialHost] = []

    def open_host() -> None:
        host = TrialHost(
            base, data, num_slots=4, max_rank=rank, token_budget=10**6, with_magnitudes=dora, precision=precision
        )
        hosts.append(host)
        for k in range(4):
            host.admit(f"t{k}", trial)
        host.step()

    with kernels.everywhere():  # one head: the reference of attention keeps each head's scores, which no kernel does
        base = load_base(trial.model, trial.quantization, device=CPU, dtype=precision)
        peak, shape = peak_bytes(open_host), read_shape(base, data)
    assert shape.fast is not None
    assert hosts[0].last_plan is not None
    forecast = HostSize(4, rank, hosts[0].last_plan.num_tokens, dora).count_bytes(shape)
    accumulated = FP32 * 4 * shape.count_adapter_numbers(rank, dora=dora)
    assert forecast - accumulated == pytest.approx(peak, rel=TOLERANCE)


METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "full"}},
    "lora": {"method": {"type": "lora", "rank": 8}},
    "qlora": {"method": {"type": "lora", "rank": 8}, "quantization": "nf4"},
    "dora": {"method": {"type": "dora", "rank": 8}},
    "qdora": {"method": {"type": "dora", "rank": 8}, "quantization": "nf4"},
    "lora+": {"optim": {"batch_size": 16, "loraplus_ratio": 16}},
    "qlora with lora+": {"optim": {"batch_size": 16, "loraplus_ratio": 16}, "quantization": "nf4"},
    "adalora": {"method": {"type": "adalora"}},
    "galore": {"method": {"type": "galore", "rank": 16}},
    "lisa": {"method": {"type": "lisa", "num_layers": 1}},
}


def check_run(trial: TrialConfig, *, peak_within: float = WITHIN) -> None:
    """Hold each part of a run's forecast to what its steps were measured to take."""
    measured = measure_cost(trial)
    (planned,) = plan_trials([trial], [], trial.name).own
    forecast = planned.memory
    print(f"{planned.label}: {forecast.peak / 1e6:,.1f} MB forecast, {measured.peak_bytes / 1e6:,.1f} MB measured")
    assert planned.trained == pytest.approx(measured.trainable_parameters, rel=WITHIN)
    assert forecast.weights == pytest.approx(measured.weight_bytes, rel=WITHIN)
    assert forecast.gradients == pytest.approx(measured.gradient_bytes, rel=WITHIN)
    assert forecast.optimizer == pytest.approx(measured.optimizer_bytes, rel=WITHIN)
    assert forecast.peak == pytest.approx(measured.peak_bytes, rel=peak_within)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_runs_forecast_is_its_peak(name: str, precision: str, tiny_llama: Path) -> None:
    check_run(trial_of(tiny_llama, **METHODS[name], compute={"device": "cpu", "precision": precision}))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_model_without_weights_has_the_shape_of_the_loaded_one(quantization: str, tiny_llama: Path) -> None:
    trial = trial_of(tiny_llama, quantization=quantization)
    base = load_base(trial.model, trial.quantization, device=CPU)
    data = load_data(trial.data, load_tokenizer(trial.model))
    model = open_outline(trial.model, trial.quantization)
    assert read_outline_shape(model, trial, read_row_sizes(trial), CPU) == read_shape(base, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_runs_forecast_is_its_peak_on_smollm2(name: str) -> None:
    settings = METHODS[name]
    optim = settings.get("optim", {}) | {"batch_size": 4}
    check_run(trial_of(Path("builtin:smollm2"), **settings | {"optim": optim, "budget": {"steps": 9}}))


@pytest.fixture
def mixtral(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Path:
    """A mixture of experts, most of whose weights are theirs."""
    config = transformers.MixtralConfig(
        vocab_size=400, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["full", "galore", "lisa"])
def test_experts_that_train_are_in_the_forecast(name: str, mixtral: Path) -> None:
    check_run(trial_of(mixtral, **METHODS[name]), peak_within=TOLERANCE)  # experts keep more than their routed widths


def test_adapted_experts_are_in_the_forecast(mixtral: Path) -> None:
    forecasts, peaks = [], []
    for experts in (False, True):
        trial = trial_of(mixtral, method={"experts": experts, "rank": 8}, optim={"batch_size": 1})
        data = load_data(trial.data, load_tokenizer(trial.model))
        base = load_base(trial.model, trial.quantization, device=CPU)
        shape = read_shape(base, data, experts=experts)
        forecasts.append(forecast_run(shape, trial.method, 32).peak)

        def begin(trial: TrialConfig = trial, data: Any = data, base: Any = base) -> None:
            loop = TrainingLoop(trial, base, data, LocalSession(mixtral, device=CPU))
            for _ in range(2):
                loop.step()

        peaks.append(peak_bytes(begin))
    assert forecasts[1] - forecasts[0] == pytest.approx(peaks[1] - peaks[0], rel=TOLERANCE)


def test_what_is_free_is_what_the_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    assert memory.read_free_bytes(CPU) is None
    (tmp_path / "meminfo").write_text("MemTotal:  9000000 kB\nMemAvailable:  8000000 kB\n")
    assert memory.read_free_bytes(CPU) == 8.192e9
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.read_free_bytes(CPU) == 8.192e9
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000000\nfile 9\nshmem 500000000\n")
    assert memory.read_free_bytes(CPU) == 2.5e9


def test_a_run_that_can_not_fit_is_refused_before_it_trains(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable:  1000 kB\n")
    monkeypatch.setattr(memory, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    trial = trial_of(tiny_llama, method={"type": "full"}, output={"root": str(tmp_path)})
    with pytest.raises(TrialError, match=r"method\.type=full takes .* beside the base, and 0\.00102 GB are free on"):
        run_trial(trial, LocalSession(tmp_path, device=CPU))


SHAPE = Shape(
    linears=((1000, 1000),) * 10, targets=((1000, 1000),) * 10, num_layers=5, num_other=1_000_000, vocabulary=1000,
    activations=1.0, predicted_share=0.0, quantization="none", value_bytes=4,
)  # fmt: skip
WANTED = HostSize(num_slots=8, max_rank=64, token_budget=4096, with_magnitudes=False)


def test_what_there_is_room_for() -> None:
    def fitted(available: float, *ranks: int) -> tuple[int, int, int]:
        size = fit_host(WANTED, SHAPE, ranks=ranks, longest=100, available=available)
        assert size.count_bytes(SHAPE) <= available
        return size.num_slots, size.max_rank, size.token_budget

    whole = WANTED.count_bytes(SHAPE)
    assert fitted(whole, 8, 64) == (8, 64, 4096)
    slots, rank, tokens = fitted(0.6 * whole, 8, 64)
    assert (slots, rank) == (8, 64)
    assert 100 < tokens < 4096
    slots, rank, tokens = fitted(0.2 * whole, 8, 64)
    assert 1 <= slots < 8
    assert rank == 64
    assert tokens >= 100
    assert fitted(0.6 * whole, 8, 64, 100_000)[1] == 64  # the bank has no slot for that one alone
    with pytest.raises(TrialError, match=r"slot of rank 8 with a row of 100 tokens fits: .* 0\.001 GB are free; lower"):
        fit_host(WANTED, SHAPE, ranks=[8, 64], longest=100, available=1e6)


def test_copies_in_the_type_of_the_arithmetic_are_counted() -> None:
    low = replace(SHAPE, value_bytes=2)
    numbers = WANTED.num_slots * SHAPE.count_adapter_numbers(64, dora=False)
    tokens = 4096 * low.count_token_bytes(64, dora=False)
    assert WANTED.count_bytes(low) == (LASTING * FP32 + 2) * numbers + tokens
    assert WANTED.find_room(low, WANTED.count_bytes(low)) == 4096
    assert WANTED.count_bytes(SHAPE) == LASTING * FP32 * numbers + 2 * tokens  # in fp32 there are none


def test_a_graphs_memory_is_beside_that_of_a_step_that_is_not_recorded() -> None:
    eager = replace(SHAPE, fast=1.0)
    graphs = replace(eager, recorded=True)
    longer = replace(WANTED, token_budget=int(ROUNDED * 4096))
    lasting = LASTING * FP32 * 8 * SHAPE.count_adapter_numbers(64, dora=False)
    shadows = lasting / LASTING
    assert WANTED.count_bytes(graphs) - WANTED.count_bytes(eager) == longer.count_bytes(eager) - lasting - shadows
    for shape in (eager, graphs):
        size = fit_host(WANTED, shape, ranks=[64], longest=100, available=0.6 * WANTED.count_bytes(graphs))
        assert size.count_bytes(shape) <= 0.6 * WANTED.count_bytes(graphs)
        larger = replace(size, token_budget=size.token_budget + 1)
        assert size == WANTED or larger.count_bytes(shape) > 0.6 * WANTED.count_bytes(graphs)


def test_logits_in_chunks_have_a_bound() -> None:
    shape = replace(SHAPE, fast=1.0, vocabulary=100_000, predicted_share=1.0)
    without = replace(shape, vocabulary=0)
    logits = [
        size.count_bytes(shape) - size.count_bytes(without)
        for size in (replace(WANTED, token_budget=t) for t in (10**4, 10**5))
    ]
    assert logits[0] == logits[1] == CHUNKS * MOST_LOGITS * FP32


def test_padding_on_a_gpu_is_counted() -> None:
    padded = replace(SHAPE, padded=True)
    assert WANTED.count_bytes(padded) - WANTED.count_bytes(SHAPE) == 4096 * PADDED * 3 * 1000 * 4
    available = WANTED.count_bytes(SHAPE)
    tokens = [
        fit_host(WANTED, shape, ranks=[64], longest=100, available=available).token_budget for shape in (SHAPE, padded)
    ]
    assert tokens[1] < tokens[0] == 4096


def test_a_quantised_base_is_smaller() -> None:
    assert SHAPE.base_bytes == 4 * 11e6
    assert replace(SHAPE, quantization="nf4").base_bytes == pytest.approx(10e6 * 0.516 + 4e6, rel=0.01)
