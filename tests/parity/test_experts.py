"""Experts that are parameters: adapted through PEFT, published, read back, merged and resumed, as any other adapter."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from codes import write_fp8, write_mxfp4
from rankloom.adapters.export import merge_adapter
from rankloom.adapters.extract import extract_adapter
from rankloom.adapters.probe import compute_last_logits, verify_probe
from rankloom.adapters.weights import load_adapter
from rankloom.banks.plain_lora import list_more_than_lora
from rankloom.banks.served_adapter import fold
from rankloom.config import TrialConfig, parse
from rankloom.data import load_data
from rankloom.errors import RegistryError
from rankloom.methods import build_method
from rankloom.models import find_experts, load_base, load_tokenizer
from rankloom.registry import Registry
from rankloom.training.loop import TrainingLoop
from rankloom.training.run import run_trial
from rankloom.training.session import LocalSession
from served import completed, engine_on, publish, serving, with_peft

CPU = torch.device("cpu")
SIZE = dict(
    vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=1,
)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
MIXTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": lambda: T.MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: T.Qwen2MoeConfig(**SIZE, **MOE, shared_expert_intermediate_size=48),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(**SIZE, **MOE, head_dim=16),
    "qwen3_next": lambda: T.Qwen3NextConfig(
        **SIZE, **MOE, **LINEAR, head_dim=16, shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
    ),
    "olmoe": lambda: T.OlmoeConfig(**SIZE, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": lambda: T.DeepseekV3Config(
        **dict(SIZE, num_key_value_heads=4), **LATENT, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1,
    ),
    "gpt_oss": lambda: T.GptOssConfig(
        **SIZE, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    ),
    "granitemoe": lambda: T.GraniteMoeConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": lambda: T.JetMoeConfig(
        **SIZE, num_local_experts=4, num_experts_per_tok=2, kv_channels=16
    ),
    "jamba": lambda: T.JambaConfig(
        **SIZE, attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2,
        num_experts=4, mamba_d_state=8, mamba_dt_rank=8,
    ),
}  # fmt: skip
RENAMED = ["deepseek_v3", "qwen2_moe", "qwen3_next"]
"""PEFT by itself moves adapters on their dense and shared layers onto experts; see `adapters/modules.py`."""
FAST = ["gpt_oss", "deepseek_v3"]
CASES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MIXTURES]


@pytest.fixture
def trial_of(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Callable[..., TrialConfig]:
    def make(kind: str, **sections: Any) -> TrialConfig:
        folder = tmp_path / kind
        if not folder.exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(MIXTURES[kind]())
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(4)
            model.save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
        rows = tmp_path / "rows.csv"
        texts = [f"{i} my card was lost,card_lost\n{i} what is the balance,check_balance\n" for i in range(20)]
        rows.write_text("text,label\n" + "".join(texts))
        tree = {
            "name": "tiny",
            "model": {"id": str(folder)},
            "data": {"train": str(rows)},
            "method": {"type": "lora", "rank": 4, "experts": True},
            "optim": {"learning_rate": 5e-3, "batch_size": 8},
            "budget": {"steps": 4},
            "eval": {"every": 2, "max_rows": 8, "max_test_rows": 8, "latency": False},
            "compute": {"num_workers": 0},
            "output": {"root": str(tmp_path)},
        }
        return parse(TrialConfig, tree | sections)

    return make


@pytest.mark.parametrize("kind", CASES)
def test_adapted_experts_are_published_read_back_and_merged(
    kind: str, trial_of: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    trial = trial_of(kind)
    run_trial(trial, LocalSession(tmp_path / "run", device=CPU))
    record = Registry(tmp_path / "registry").verify("tiny@1")
    folder = tmp_path / "registry" / "tiny" / "1"
    ids = list(range(5, 25))
    base = load_base(trial.model, trial.quantization, device=CPU).model
    stacks = {name: parameter.clone() for name, parameter in find_experts(base).items()}
    plain = compute_last_logits(base, ids)
    assert list_more_than_lora(base, folder) == ["a LoRA on experts"]
    adapted = compute_last_logits(load_adapter(base, folder), ids)
    assert (adapted - plain).abs().max() > 1e-2

    if kind not in RENAMED:
        others = AutoModelForCausalLM.from_pretrained(trial.model.id, dtype=torch.float32).eval()
        theirs = peft.PeftModel.from_pretrained(others, folder)
        torch.testing.assert_close(compute_last_logits(theirs, ids), adapted, atol=1e-4, rtol=1e-4)

    merge_adapter(folder, record, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(compute_last_logits(merged, ids), adapted, atol=1e-3, rtol=1e-3)
    assert all(not torch.equal(each, stacks[name]) for name, each in find_experts(merged).items())


def stored_types(folder: Path) -> dict[str, torch.dtype]:
    return {name: t.dtype for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize(("kind", "write"), [("deepseek_v3", write_fp8), ("gpt_oss", write_mxfp4)])
def test_experts_that_are_stored_as_codes_are_merged_into_plain_weights(
    kind: str, write: Callable[[Path], Path], trial_of: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    trial = trial_of(kind)
    model = AutoModelForCausalLM.from_pretrained(trial.model.id, dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = 0.5 + torch.arange(4) * 1e-4  # which bf16 can't tell apart
    model.save_pretrained(trial.model.id)
    write(Path(trial.model.id))
    run_trial(trial, LocalSession(tmp_path / "run", device=CPU))
    folder = tmp_path / "registry" / "tiny" / "1"
    merge_adapter(folder, Registry(tmp_path / "registry").verify("tiny@1"), tmp_path / "merged")

    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    types = stored_types(tmp_path / "merged")
    in_fp32 = {name for name, dtype in types.items() if dtype != torch.bfloat16}
    assert in_fp32 == {name for name in types if name.endswith("e_score_correction_bias")}
    ids = list(range(5, 25))
    base = load_base(trial.model, trial.quantization, device=CPU, dtype=torch.float32).model
    plain, adapted = compute_last_logits(base, ids), compute_last_logits(load_adapter(base, folder), ids)
    merged, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    torch.testing.assert_close(compute_last_logits(merged.eval(), ids), adapted, atol=3e-2, rtol=0)  # bf16's rounding
    assert (adapted - plain).abs().max() > 0.3


@pytest.mark.parametrize(("kind", "write"), [("qwen3_moe", write_fp8), ("gpt_oss", write_mxfp4)])
def test_what_full_fine_tuning_makes_of_codes_is_kept_as_plain_weights(
    kind: str, write: Callable[[Path], Path], trial_of: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    output = {"root": str(tmp_path), "keep_model": True}
    trial = trial_of(kind, method={"type": "full", "extract_rank": 64}, output=output)
    write(Path(trial.model.id))
    run_trial(trial, LocalSession(tmp_path / "run", device=CPU))
    kept = tmp_path / "runs" / "tiny" / "model"
    assert "quantization_config" not in (kept / "config.json").read_text()
    assert {*stored_types(kept).values()} == {torch.float32}
    ids = list(range(5, 25))
    base = load_base(trial.model, trial.quantization, device=CPU, dtype=torch.float32).model
    plain = compute_last_logits(base, ids)
    adapted = compute_last_logits(load_adapter(base, tmp_path / "registry" / "tiny" / "1"), ids)
    tuned = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32).eval()
    torch.testing.assert_close(compute_last_logits(tuned, ids), adapted, atol=1e-3, rtol=1e-3)
    assert (adapted - plain).abs().max() > 0.3


SECTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"compute": {"num_workers": 0, "precision": "bf16"}},
    "recomputed": {"compute": {"num_workers": 0, "activation_checkpointing": True}},
    "loraplus": {"optim": {"learning_rate": 1e-3, "batch_size": 8, "loraplus_ratio": 4}},
    "nf4": {"quantization": "nf4"},
    "int8": {"quantization": "int8"},
    "experts and q": {
        "method": {"type": "lora", "rank": 4, "experts": True, "target_modules": ["q_proj"], "rslora": True}
    },
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "bf16" else pytest.mark.slow) for case in SECTIONS]
)
def test_goes_with(case: str, trial_of: Callable[..., TrialConfig], tmp_path: Path) -> None:
    trial = trial_of("mixtral", **SECTIONS[case])
    run_trial(trial, LocalSession(tmp_path / "run", device=CPU))
    record = Registry(tmp_path / "registry").verify("tiny@1")
    verify_probe(tmp_path / "registry" / "tiny" / "1", record)


def test_a_folder_is_held_to_its_experts(trial_of: Callable[..., TrialConfig], tmp_path: Path) -> None:
    trial = trial_of("mixtral")
    base = load_base(trial.model, trial.quantization, device=CPU)
    method = build_method(trial, num_steps=1)
    method.export(method.attach(base), base, tmp_path / "a")
    for wrong, reason in (
        ({"target_parameters": ["embed_tokens.weight"]}, "embed_tokens.weight' matches no experts"),
        ({"target_parameters": ["experts.down"]}, "experts.down' matches no experts"),
        ({"target_parameters": ["experts.down_proj"]}, "has shape|has no place|is missing"),
        ({"target_parameters": None}, "has no place"),
        ({"use_dora": True}, "use_dora: can't be combined"),
        ({"lora_dropout": 0.5}, "lora_dropout: can't be combined"),
    ):
        settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        folder = shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(settings | wrong))
        fresh = load_base(trial.model, trial.quantization, device=CPU).model
        modules = len(list(fresh.modules()))
        with pytest.raises(RegistryError, match=reason):
            load_adapter(fresh, folder)
        assert len(list(fresh.modules())) == modules


def test_resumed_is_uninterrupted(trial_of: Callable[..., TrialConfig], tmp_path: Path) -> None:
    trial = trial_of("mixtral")
    data = load_data(trial.data, load_tokenizer(trial.model))

    def loop(run: str) -> TrainingLoop:
        base = load_base(trial.model, trial.quantization, device=CPU)
        return TrainingLoop(trial, base, data, LocalSession(tmp_path / run, device=CPU))

    whole, cut = loop("whole"), loop("cut")
    for _ in range(4):
        whole.step()
    for _ in range(2):
        cut.step()
    cut.save(0.0)
    resumed = loop("cut")
    assert resumed.progress.step == 2
    for _ in range(2):
        resumed.step()
    for (name, one), (_, other) in zip(whole.module.named_parameters(), resumed.module.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def write(folder: Path, base: Path, kind: str) -> None:
    generator = torch.Generator().manual_seed(len(kind))
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if kind == "extracted":  # the experts whole
        for parameter in model.parameters():
            parameter.data.add_(0.03 * torch.randn(parameter.shape, generator=generator))
        extract_adapter(model, base, 8, folder, "a/base")
        return
    experts = None if kind == "layers" else ["experts.gate_up_proj", "experts.down_proj"][kind == "down" :]
    alphas = {"experts.down_proj": 3} if kind == "both" else {}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=[] if kind == "experts" else ["q_proj"],
        target_parameters=experts,
        alpha_pattern=alphas,
    )
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.15, generator=generator)
    model.save_pretrained(folder, save_embedding_layers=False)


@pytest.mark.parametrize(
    "kind", ["mixtral", *(pytest.param(each, marks=pytest.mark.slow) for each in ("olmoe", "qwen3_moe"))]
)
def test_a_mixed_batch_gives_what_peft_gives_one_by_one(
    kind: str, trial_of: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    base, registry = Path(trial_of(kind).model.id), tmp_path / "served"
    refs: dict[str | None, Path | None] = {None: None}
    for adapter in ("layers", "both", "down", "experts", "extracted"):
        write(tmp_path / adapter, base, adapter)
        refs[publish(registry, base, adapter, tmp_path / adapter)] = tmp_path / adapter
    prompts = [[7, 50, 101, 9 + i, *range(20, 20 + 3 * i)] for i in range(12)]
    jobs = [(ref, prompts[i]) for i, ref in enumerate([*refs, *refs])]
    engine = engine_on(base, registry, max_num_seqs=6, max_num_batched_tokens=16, prefix_cache_tokens=0)

    async def work() -> list[list[int]]:
        each = (completed(engine, prompt, ref, id=str(i), max_tokens=6) for i, (ref, prompt) in enumerate(jobs))
        return [tokens for _, tokens, _ in await asyncio.gather(*each)]

    found = serving(engine, work)
    assert found == [with_peft(base, refs[ref], prompt, 6) for ref, prompt in jobs]
    assert len({tuple(with_peft(base, folder, prompts[0], 6)) for folder in refs.values()}) == len(refs)


def test_experts_that_get_tokens_in_another_order_are_refused(
    trial_of: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    trial = trial_of("jetmoe")
    base = load_base(trial.model, trial.quantization, device=CPU)
    method = build_method(trial, num_steps=1)
    method.export(method.attach(base), base, tmp_path / "a")
    with pytest.raises(RegistryError, match="--format merged"):
        fold(load_base(trial.model, trial.quantization, device=CPU).model, tmp_path / "a")
