"""Plans from configs alone: models of many sizes in seconds, what fits, and what is refused before a run."""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV32Config, MambaConfig

import rankloom as rl
from rankloom.cli import main
from rankloom.config import TrialConfig, parse
from rankloom.config.model import NoQuantization
from rankloom.engine.kv_cache import MOST_PREFIX_TOKENS, KvShape
from rankloom.engine.padded_cache import forecast_shape
from rankloom.errors import ConfigError, ModelError
from rankloom.events import Event, PhaseStarted, WarningRaised
from rankloom.models import load_base
from rankloom.planning import gate
from rankloom.planning.endpoint import announce_endpoint, forecast_replica
from rankloom.planning.forecast import name_recipe
from rankloom.planning.gate import announce_plan
from rankloom.planning.outline import open_outline
from rankloom.planning.plan import find_smaller, parse_bytes, plan
from rankloom.planning.speed import find_speed, read_measured_rows
from rankloom.training.memory_plan import format_gb

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "TinyLlama-1.1B": (
        1_100_048_384,
        LLAMA
        | dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
               num_key_value_heads=4, vocab_size=32_000, max_position_embeddings=2048),
    ),
    "Llama-3-8B": (
        8_030_261_248,
        LLAMA
        | dict(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128_256, max_position_embeddings=8192),
    ),
    "Llama-3-70B": (
        70_553_706_496,
        LLAMA
        | dict(hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
               num_key_value_heads=8, vocab_size=128_256, max_position_embeddings=8192),
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        dict(model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], hidden_size=2048, intermediate_size=6144,
             moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, head_dim=128, num_hidden_layers=48,
             num_attention_heads=32, num_key_value_heads=4, vocab_size=151_936, max_position_embeddings=40_960,
             decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, tie_word_embeddings=False),
    ),
}  # fmt: skip
"""Name -> its number of parameters, and its config."""
TEN = ["lora", "full", "qlora", "dora", "qdora", "lora-plus", "qlora-lora-plus", "adalora", "galore", "lisa"]


@pytest.fixture(scope="module")
def open_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes the config of one of `MODELS`, and nothing else, into a folder."""

    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(MODELS[name][1]))
        return folder

    return write


def settings_of(model: Path, **changed: Any) -> dict[str, Any]:
    tree = {"name": "t", "model": str(model), "data": {"max_length": 512}, "optim": {"batch_size": 4}}
    return tree | {"compute": {"device": "cuda"}} | changed


@pytest.mark.parametrize("name", MODELS)
def test_a_config_alone_is_planned_in_seconds(name: str, open_model: Callable[[str], Path]) -> None:
    settings = settings_of(open_model(name))
    began = time.process_time()
    planned = plan(settings, memory="80GB")
    assert time.process_time() - began < 5
    assert sum(planned.parameters.values()) == MODELS[name][0]
    assert [each.label for each in planned.methods] == TEN
    by_label = {each.label: each.memory for each in planned.methods}
    assert by_label["qlora"].peak < by_label["lora"].peak < by_label["dora"].peak
    assert by_label["full"].optimizer >= 2 * by_label["full"].gradients > by_label["galore"].optimizer / 2
    assert by_label["lora"].weights == 2 * MODELS[name][0] + by_label["lora"].gradients
    assert not planned.rows.are_read


def test_experts_are_counted_and_not_quantised(open_model: Callable[[str], Path]) -> None:
    planned = plan(settings_of(open_model("Qwen3-30B-A3B")), memory="80GB")
    assert planned.parameters["experts"] == 48 * 128 * 3 * 2048 * 768
    weights = {each.label: each.memory.weights for each in planned.methods}
    assert weights["qlora"] > 2 * planned.parameters["experts"]
    assert weights["qlora"] < weights["lora"]


def test_what_fits_is_the_largest_that_does(open_model: Callable[[str], Path]) -> None:
    folder = open_model("TinyLlama-1.1B")
    (method,) = plan(settings_of(folder, quantization="nf4"), memory="8GB").own
    assert method.fits
    assert method.largest_batch is not None
    assert method.members is not None
    assert method.members > 1
    for extra, fits in ((0, True), (1, False)):
        settings = settings_of(folder, quantization="nf4", optim={"batch_size": method.largest_batch + extra})
        assert plan(settings, memory="8GB").own[0].fits is fits


def test_settings_that_save_memory_do(open_model: Callable[[str], Path]) -> None:
    folder = open_model("TinyLlama-1.1B")

    def peak(**changed: Any) -> float:
        return plan(settings_of(folder, **changed), memory="80GB").own[0].memory.peak

    lora = peak()
    assert peak(compute={"device": "cuda", "activation_checkpointing": True}) < lora
    assert peak(optim={"batch_size": 4, "accumulation": 4}) < lora
    assert peak(method={"type": "lora", "rank": 64}) > lora
    assert peak(data={"max_length": 1024}) > lora
    full = {"method": {"type": "full"}}
    one, eight = (plan(settings_of(folder, **full), memory="80GB", num_workers=n).own[0].memory for n in (1, 8))
    assert eight.optimizer == one.optimizer / 8


def test_a_trials_rows_are_read(tiny_llama: Path) -> None:
    planned = plan({"name": "t", "model": str(tiny_llama), "budget": {"steps": 7}, "data": {"max_train_rows": 32}})
    assert planned.rows.are_read
    assert planned.rows.longest < 512
    assert planned.rows.num_steps == 7
    (own,) = planned.own
    assert own.speed is not None
    assert own.seconds == pytest.approx(7 * planned.rows.step_tokens / own.speed.tokens_per_s)


def test_time_and_cost_come_from_measured_rows(tiny_llama: Path) -> None:
    settings = {"name": "t", "model": str(tiny_llama), "compute": {"device": "cpu"}}
    dear, cheap = (plan(settings, price_per_hour=price).own[0].cost for price in (2.0, 1.0))
    assert dear == pytest.approx(2 * cheap)
    repository = Path(__file__).resolve().parents[3]
    assert {row.method for row in read_measured_rows()} == set(TEN)
    assert all((repository / row.source).is_file() for row in read_measured_rows())
    assert find_speed(torch.device("cuda"), "lora", 10**9) is None


def test_a_calibration_measures_this_device(tiny_llama: Path) -> None:
    planned = plan({"name": "t", "model": str(tiny_llama)}, calibrate=True)
    speeds = {each.label: each.speed for each in planned.methods}
    assert speeds["lora"] is not None
    assert "calibrated" in speeds["lora"].source
    assert speeds["lora"].tokens_per_s > 100


@pytest.mark.parametrize(
    ("memory", "prefer", "label"),
    [
        ("16GB", "accuracy", "lora"),
        ("2GB", "accuracy", "qlora"),
        ("16GB", "memory", "qlora"),
        ("0.1GB", "memory", None),
    ],
)
def test_a_budget_gets_a_recommendation_with_reasons(
    memory: str, prefer: Any, label: str | None, open_model: Callable[[str], Path]
) -> None:
    settings = settings_of(open_model("TinyLlama-1.1B"), optim={"batch_size": 1}, data={"max_length": 256})
    found = plan(settings, memory=memory, prefer=prefer).recommendation
    assert found is not None
    assert found.label == label
    assert found.reasons
    assert bool(found.rows) == (prefer == "accuracy")


@pytest.mark.parametrize(("given", "size"), [("16GB", 16e9), ("15.5 GiB", 15.5 * 2**30), (1e9, 1e9)])
def test_sizes_are_read(given: str | float, size: float) -> None:
    assert parse_bytes(given) == size


@pytest.mark.parametrize("given", ["much", "16 QB", "-1GB", "0", "1.2.3GB"])
def test_other_sizes_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"memory: .* is not a size; give one such as 16GB"):
        parse_bytes(given)


def trial_of(model: Path, **changed: Any) -> TrialConfig:
    return parse(TrialConfig, {"name": "t", "model": str(model), "compute": {"device": "cpu"}} | changed)


def test_three_lines_come_before_a_run(tiny_llama: Path) -> None:
    events: list[Event] = []
    announce_plan([trial_of(tiny_llama)], "t", events.append)
    lines = [event.message for event in events if isinstance(event, PhaseStarted)]
    assert [line.split()[0] for line in lines] == ["model", "memory", "time"]
    assert len(events) == 3


def test_what_the_engine_can_not_serve_is_said_before_a_run_and_before_an_endpoint(
    tmp_path: Path, make_tokenizer: Callable[..., Any]
) -> None:
    config = DeepseekV32Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32, index_head_dim=16,
        index_n_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    events: list[Event] = []
    announce_plan([trial_of(tmp_path)], "t", events.append)
    (warning,) = (event.message for event in events if isinstance(event, WarningRaised))
    assert "can't be served by the engine bank: it has layers of a type (indexed_attention)" in warning
    with pytest.raises(ModelError, match=r"\(indexed_attention\).* serve it with engine\.type=vllm"):
        announce_endpoint(rl.ServeConfig(base=str(tmp_path), adapters=[], replicas={"gpus": 0}), events.append)


def test_the_states_of_recurrent_layers_are_planned(
    tmp_path: Path, make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = MambaConfig(vocab_size=400, hidden_size=512, num_hidden_layers=2, state_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    events: list[Event] = []
    announce_endpoint(rl.ServeConfig(base=str(tmp_path), adapters=[], replicas={"gpus": 0}), events.append)
    (memory,) = (e.message for e in events if isinstance(e, PhaseStarted) and e.message.startswith("memory"))
    of_one = 2 * 1024 * (64 + 4) * 4  # layers, channels, numbers of recurrence and convolution, bytes
    assert f"states {format_gb(2 * 16 * of_one)} of 16 sequences" in memory
    assert "KV cache" not in memory

    def look(*_: Any) -> KvShape:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr("rankloom.planning.endpoint.forecast_shape", look)
    announce_endpoint(rl.ServeConfig(base=str(tmp_path), adapters=[], replicas={"gpus": 0}), events.append)
    (_, memory) = (e.message for e in events if isinstance(e, PhaseStarted) and e.message.startswith("memory"))
    assert re.fullmatch(r"memory  each of 1 replica\(s\): weights [^,]*, adapters [^,]*; .* are free for each", memory)


def test_what_can_not_fit_is_refused_with_what_to_change(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = trial_of(tiny_llama, optim={"batch_size": 64}, method={"type": "full"})
    need = gate.plan_trials([trial], [], "t").own[0].memory.peak
    monkeypatch.setattr("rankloom.planning.plan.read_free_bytes", lambda _: need / 2)
    with pytest.raises(ConfigError, match=r"optim\.batch_size=64: full needs .* are free .* set optim\.batch_size=\d+"):
        announce_plan([trial], "t", lambda _: None)
    advice = find_smaller(trial, need / 2, 1)
    assert advice is not None
    assert "optim.accumulation=4" in advice
    monkeypatch.setattr("rankloom.planning.plan.read_free_bytes", lambda _: 1000.0)
    with pytest.raises(ConfigError, match=r"method\.type=full, .* take a smaller model or a larger device"):
        announce_plan([trial], "t", lambda _: None)


def test_a_run_that_can_not_fit_starts_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankloom.planning.plan.read_free_bytes", lambda _: 1000.0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    trial = trial_of(tiny_llama, output={"root": str(tmp_path / "out")})
    with pytest.raises(ConfigError, match=r"method\.type=lora"):
        rl.train(trial)
    assert not (tmp_path / "out").exists()
    study = rl.StudyConfig(
        name="s", trial={"model": str(tiny_llama), "output": {"root": str(tmp_path / "out")}},
        space=[{"method": {"type": "lora", "rank": {"choice": [4, 8]}}}],
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"method\.type=lora"):
        rl.tune(study)
    assert not (tmp_path / "out").exists()


def study_of(model: Path, *space: dict[str, Any], **changed: Any) -> rl.StudyConfig:
    return parse(rl.StudyConfig, {"name": "s", "trial": {"model": str(model)} | changed, "space": list(space)})


def test_a_study_is_planned_by_the_trials_that_need_most(tiny_llama: Path) -> None:
    batch = {"batch_size": {"choice": [4, 64, 16]}, "accumulation": {"choice": [4, 1]}}
    plus = {"loraplus_ratio": {"choice": [1, 16]}}
    methods = {"choice": [{"type": "galore"}, {"type": "full"}]}
    lora = {"type": "lora", "rank": {"choice": [32, 8]}, "target_modules": {"choice": [["q_proj"], "all-linear"]}}
    study = study_of(tiny_llama, {"method": methods, "optim": batch}, {"method": lora, "optim": batch | plus})
    most = {"batch_size": 64}
    planned = plan(study, memory="16GB").own
    assert [each.label for each in planned] == ["lora", "galore", "full", "lora-plus"]  # the baseline is lora
    assert planned[3].trained == planned[0].trained
    for method, each in zip(({"rank": 32}, {"type": "galore"}, {"type": "full"}), planned[:3], strict=True):
        (alone,) = plan(trial_of(tiny_llama, method=method, optim=most, compute={}), memory="16GB").own
        assert each == alone


def test_a_study_of_two_models_is_planned_by_the_one_that_needs_most(open_model: Callable[[str], Path]) -> None:
    small, large = open_model("TinyLlama-1.1B"), open_model("Llama-3-8B")
    study = study_of(small, {"model": {"choice": [str(large), str(small)]}}, compute={"device": "cuda"})
    planned = plan(study, memory="80GB")
    assert planned.model == str(large)
    events: list[Event] = []
    announce_plan(list(study.probe_trials()), "s", events.append, fused=True)
    assert len(events) == 6


def test_the_value_of_a_studys_knob_that_can_not_fit_is_named(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    space = {"method": {"type": "full"}, "optim": {"batch_size": {"choice": [4, 512, 8]}}}
    study = study_of(tiny_llama, space)
    (own,) = plan(trial_of(tiny_llama, method={"type": "full"}, optim={"batch_size": 8}, compute={}), memory="16GB").own
    monkeypatch.setattr("rankloom.planning.plan.read_free_bytes", lambda _: 1.5 * own.memory.peak)
    with pytest.raises(ConfigError, match=r"optim\.batch_size=512: full needs .* leave values above \d+ out of the sp"):
        rl.tune(study)


def test_an_endpoint_is_planned_and_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = rl.ServeConfig(base=str(tiny_llama), adapters=[], engine={"kv_cache_tokens": 1000}, replicas={"gpus": 0})
    events: list[Event] = []
    announce_endpoint(config, events.append)
    model, memory, load = (event.message for event in events if isinstance(event, PhaseStarted))
    assert "parameters" in model
    assert "for 1,000 tokens" in memory
    assert "16 sequences" in load
    base = load_base(config.base, NoQuantization(), device=torch.device("cpu"))
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    assert f"weights {format_gb(weights)}" in memory
    cache = base.model(torch.zeros(1, 10, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert 10 * forecast_shape(base.model, torch.float32).bytes_per_token == kept
    assert re.search(r"prefixes .* for 8,192 tokens, adapters .* for 64 of rank 16", memory)
    monkeypatch.setattr("rankloom.planning.plan.read_free_bytes", lambda _: weights / 2)
    with pytest.raises(ConfigError, match=r"base=.*: the weights take .* set quantization=nf4, replicas\.min=1"):
        announce_endpoint(config, events.append)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_replica_on_a_gpu_is_planned(quantization: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, events = torch.device("cuda"), list[Any]()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("rankloom.planning.endpoint.choose_device", lambda _: gpu)
    monkeypatch.setattr("rankloom.planning.endpoint.find_available", lambda *_: 1e9)
    monkeypatch.setattr("rankloom.kernels._has_triton", lambda: True)
    config = rl.ServeConfig(base=str(tiny_llama), adapters=[], quantization=quantization)
    announce_endpoint(config, events.append)
    assert config.base is not None
    planned = forecast_replica(config, open_outline(config.base, NoQuantization()), gpu, 1e9)
    heads, engine = planned.shape.bytes_per_token, config.engine
    assert planned.prefix_tokens == MOST_PREFIX_TOKENS
    assert planned.cache_tokens == min(
        engine.resolve_num_seqs(on_gpu=True) * 512, int((1e9 - planned.weights) / 2) // heads
    )
    assert planned.describe() in events[1].message
    large = config.model_copy(update={"engine": engine.model_copy(update={"kv_cache_tokens": int(2e9) // heads})})
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_tokens=\d+: takes 2 GB at the start"):
        announce_endpoint(large, events.append)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_prints_a_row_for_each_method(
    as_json: bool, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "trial.yaml"
    config.write_text(f"name: t\nmodel: {tiny_llama}\ncompute: {{device: cpu, price_per_hour: 3.0}}\n")
    with pytest.raises(SystemExit) as end:
        main(["plan", str(config), "--memory", "8GB", "--prefer", "speed", *(["--json"] if as_json else [])])
    assert end.value.code == 0
    assert gc.isenabled()
    text = capsys.readouterr().out
    if as_json:
        planned = json.loads(text)
        assert [each["label"] for each in planned["methods"]] == TEN
        assert planned["methods"][0]["cost"] == pytest.approx(planned["methods"][0]["seconds"] / 3600 * 3)
    else:
        assert text.startswith("model ")
        assert all(f"\n{label} " in text for label in TEN)
        assert "\ntake    lora-plus: " in text


def test_names_of_recipes() -> None:
    both = {"quantization": "nf4", "optim": {"loraplus_ratio": 16}}
    for name, changed in {"qlora-lora-plus": both, "lora-plus": {"optim": {"loraplus_ratio": 16}}}.items():
        assert name_recipe(parse(TrialConfig, {"name": "t"} | changed)) == name
