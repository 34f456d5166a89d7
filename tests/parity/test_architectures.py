"""Every architecture, tiny and random, the whole way: each method trained and published, a host beside the dedicated
run, labels by trie beside one by one, merged beside adapter, served beside the model's own tokens. What can't be done
is refused before it begins.

A few stand for the rest among the fast tests; `slow` runs them all.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from rankloom.adapters.export import merge_adapter
from rankloom.adapters.probe import compute_last_logits
from rankloom.adapters.weights import load_adapter
from rankloom.config import TrialConfig, parse
from rankloom.config.model import Int8
from rankloom.data import TaskData, load_data
from rankloom.engine.kv_cache import NARROWEST
from rankloom.engine.layers import find_obstacle
from rankloom.engine.model_runner import ModelRunner
from rankloom.errors import ModelError
from rankloom.evals.labels import LabelTrie, predict_labels
from rankloom.events import Event, StepFinished
from rankloom.models import Base, load_base, load_tokenizer
from rankloom.planning.outline import open_outline
from rankloom.registry import Registry
from rankloom.training.fused.host import TrialHost
from rankloom.training.loop import TrainingLoop
from rankloom.training.run import run_trial
from rankloom.training.session import LocalSession
from served import completed, engine_on, plain, serving

CPU = torch.device("cpu")
IDS = dict(vocab_size=400, pad_token_id=0, eos_token_id=1, bos_token_id=1)
SIZE = dict(**IDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
GPT2 = dict(**IDS, n_embd=64, n_layer=2, n_head=4, n_positions=512)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
WINDOW = dict(**SIZE, **HEADS, head_dim=16, sliding_window=16)
BOTH = ["sliding_attention", "full_attention"]
FOUR = dict(SIZE, num_hidden_layers=4)
MAMBA_2 = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2)
BARE = dict(**IDS, hidden_size=64, num_hidden_layers=2)
ALL_HEADS = dict(num_attention_heads=4, max_position_embeddings=512)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)

ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: T.LlamaConfig(**SIZE, **HEADS, tie_word_embeddings=False),
    "llama-tied-bias": lambda: T.LlamaConfig(**SIZE, **HEADS, tie_word_embeddings=True, attention_bias=True),
    "mistral": lambda: T.MistralConfig(**SIZE, **HEADS, sliding_window=16),
    "mixtral": lambda: T.MixtralConfig(**SIZE, **HEADS, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": lambda: T.Qwen2Config(**SIZE, **HEADS),
    "qwen3": lambda: T.Qwen3Config(**SIZE, **HEADS, head_dim=16),
    "qwen2_moe": lambda: T.Qwen2MoeConfig(**SIZE, **HEADS, **MOE, shared_expert_intermediate_size=48),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(**SIZE, **HEADS, **MOE, head_dim=16),
    "qwen3_next": lambda: T.Qwen3NextConfig(
        **FOUR, **HEADS, **MOE, **LINEAR, head_dim=16, shared_expert_intermediate_size=32
    ),
    "qwen3_5": lambda: T.Qwen3_5TextConfig(**FOUR, **HEADS, **LINEAR, head_dim=16),
    "deepseek_v3": lambda: T.DeepseekV3Config(
        **SIZE, **dict(HEADS, num_key_value_heads=4), **LATENT, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1,
    ),
    "smollm3": lambda: T.SmolLM3Config(**SIZE, **HEADS),
    "olmo2": lambda: T.Olmo2Config(**SIZE, **HEADS),
    "olmoe": lambda: T.OlmoeConfig(**SIZE, **HEADS, num_experts=4, num_experts_per_tok=2),
    "phi": lambda: T.PhiConfig(**SIZE, **HEADS),
    "phi3": lambda: T.Phi3Config(**SIZE, **HEADS),
    "gemma": lambda: T.GemmaConfig(**SIZE, **HEADS, head_dim=16),
    "gemma2": lambda: T.Gemma2Config(**SIZE, **HEADS, head_dim=16, sliding_window=16),
    "gemma3": lambda: T.Gemma3Config(
        text_config=dict(**WINDOW, layer_types=BOTH), vision_config=VISION, mm_tokens_per_image=4,
        image_token_index=399, boi_token_index=397, eoi_token_index=398, **IDS,
    ),
    "gpt_oss": lambda: T.GptOssConfig(
        **SIZE, **HEADS, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    ),
    "granite": lambda: T.GraniteConfig(**SIZE, **HEADS),
    "cohere": lambda: T.CohereConfig(**SIZE, **HEADS),
    "stablelm": lambda: T.StableLmConfig(**SIZE, **HEADS),
    "starcoder2": lambda: T.Starcoder2Config(**SIZE, **HEADS),
    "gpt_neox": lambda: T.GPTNeoXConfig(**SIZE, **ALL_HEADS),
    "gptj": lambda: T.GPTJConfig(**GPT2, rotary_dim=8),
    "codegen": lambda: T.CodeGenConfig(**GPT2, rotary_dim=8),
    "bloom": lambda: T.BloomConfig(**IDS, hidden_size=64, n_layer=2, n_head=4),
    "mpt": lambda: T.MptConfig(**IDS, d_model=64, n_layers=2, n_heads=4, max_seq_len=512),
    "persimmon": lambda: T.PersimmonConfig(**SIZE, **ALL_HEADS),
    "lfm2": lambda: T.Lfm2Config(**SIZE, **HEADS, layer_types=["conv", "full_attention"]),
    "jamba": lambda: T.JambaConfig(
        **SIZE, **HEADS, attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2,
        num_experts=4, mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False,
    ),
    "mamba": lambda: T.MambaConfig(**BARE, state_size=8),
    "mamba2": lambda: T.Mamba2Config(**BARE, state_size=8, num_heads=8, head_dim=16, expand=2, n_groups=1),
    "recurrent_gemma": lambda: T.RecurrentGemmaConfig(
        **dict(SIZE, num_hidden_layers=3), num_attention_heads=4, num_key_value_heads=2, head_dim=16, lru_width=64,
        attention_window_size=16,
    ),
    "falcon": lambda: T.FalconConfig(**BARE, num_attention_heads=4),
    "gpt_neo": lambda: T.GPTNeoConfig(
        **IDS, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16,
        max_position_embeddings=512,
    ),
    "gpt2": lambda: T.GPT2Config(**GPT2),
    "gpt_bigcode": lambda: T.GPTBigCodeConfig(**GPT2),
    "opt": lambda: T.OPTConfig(**BARE, **ALL_HEADS, ffn_dim=128, word_embed_proj_dim=64),
    "xglm": lambda: T.XGLMConfig(**IDS, d_model=64, ffn_dim=128, num_layers=2, attention_heads=4,
                                 max_position_embeddings=512),
    "bart": lambda: T.BartConfig(
        **IDS, d_model=64, encoder_layers=2, decoder_layers=2, decoder_ffn_dim=128, encoder_ffn_dim=128,
        decoder_attention_heads=4, encoder_attention_heads=4, max_position_embeddings=512,
    ),
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 3},
    "adalora": {"interval": 1, "initial_rank": 6, "target_rank": 3},
    "full": {"extract_rank": 8},
    "galore": {"rank": 8, "extract_rank": 8},
    "lisa": {"num_layers": 1, "extract_rank": 8},
}
WORDS = ["card", "lost", "balance", "transfer", "money", "friend", "pin", "please", "the", "my", "is", "of", "to", "12"]
LABELS = ["card_lost", "check_balance", "transfer", "change_pin", "yes", "no"]

FAST_RUNS = [
    ("deepseek_v3", "lora"), ("deepseek_v3", "adalora"), ("gemma3", "adalora"), ("gpt_neox", "full"), ("mamba", "full"),
    ("mixtral", "full"), ("qwen3_5", "lora"), ("qwen3_5", "lisa"), ("recurrent_gemma", "full"),
]  # fmt: skip
FAST_HOSTS = ["deepseek_v3", "gpt2", "mamba"]
FAST_LABELS = ["gpt_neo", "mpt", "qwen3_5"]
FAST_SERVED = ["deepseek_v32", "minimax", "gemma2", "gemma4_text-shared", "gpt_neo", "gpt_oss", "qwen3_5"]
SERVED_PAGE = Path(__file__).parents[2] / "docs" / "guide" / "architectures.md"
GEMMA_4 = dict(
    FOUR, **HEADS, head_dim=16, global_head_dim=32, num_global_key_value_heads=1, sliding_window=16,
    layer_types=[*BOTH, *BOTH], vocab_size_per_layer_input=400, hidden_size_per_layer_input=8,
)  # fmt: skip
SERVED_TOO: dict[str, Callable[[], PretrainedConfig]] = {
    "phi3-window": lambda: T.Phi3Config(**SIZE, **HEADS, sliding_window=16),
    "qwen2-window": lambda: T.Qwen2Config(
        **SIZE, **HEADS, use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "qwen3-window": lambda: T.Qwen3Config(**WINDOW, use_sliding_window=True, max_window_layers=1),
    "gemma3_text": lambda: T.Gemma3TextConfig(**WINDOW, layer_types=BOTH),
    "gemma3n_text": lambda: T.Gemma3nTextConfig(
        **dict(WINDOW, num_hidden_layers=4), layer_types=[*BOTH, *BOTH], num_kv_shared_layers=2, laurel_rank=8,
        vocab_size_per_layer_input=400, hidden_size_per_layer_input=8, activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0],
    ),
    "gemma4_text": lambda: T.Gemma4TextConfig(**GEMMA_4, attention_k_eq_v=True),
    "gemma4_text-shared": lambda: T.Gemma4TextConfig(**GEMMA_4, num_kv_shared_layers=2),
    "olmo3": lambda: T.Olmo3Config(**SIZE, **HEADS, sliding_window=16, layer_types=BOTH),
    "cohere2": lambda: T.Cohere2Config(**SIZE, **HEADS, sliding_window=16, layer_types=BOTH),
    "ministral": lambda: T.MinistralConfig(**WINDOW, layer_types=BOTH),
    "deepseek_v3-wide": lambda: T.DeepseekV3Config(
        **SIZE, **dict(HEADS, num_key_value_heads=4), **dict(LATENT, v_head_dim=24), n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1,
    ),
    "deepseek_v32": lambda: T.DeepseekV32Config(
        **SIZE, **dict(HEADS, num_key_value_heads=4), **LATENT, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=32, index_head_dim=16, index_n_heads=2,
    ),
    "llama4_text": lambda: T.Llama4TextConfig(
        **SIZE, **HEADS, head_dim=16, intermediate_size_mlp=64, num_local_experts=4, attention_chunk_size=16
    ),
    "falcon_h1": lambda: T.FalconH1Config(
        **SIZE, **HEADS, **dict(MAMBA_2, mamba_expand=1), mamba_d_ssm=128, head_dim=16
    ),
    "falcon_mamba": lambda: T.FalconMambaConfig(**BARE, state_size=8),
    "bamba": lambda: T.BambaConfig(**SIZE, **HEADS, **MAMBA_2, attn_layer_indices=[1]),
    "granitemoehybrid": lambda: T.GraniteMoeHybridConfig(
        **SIZE, **HEADS, **MAMBA_2, layer_types=["mamba", "attention"], num_local_experts=4, num_experts_per_tok=2,
        shared_intermediate_size=32,
    ),
    "zamba2": lambda: T.Zamba2Config(
        **SIZE, **dict(HEADS, num_key_value_heads=4), mamba_ngroups=1, n_mamba_heads=8, mamba_d_state=8,
        mamba_headdim=16, layers_block_type=["mamba", "hybrid"], num_mem_blocks=1, adapter_rank=8,
    ),
    "lfm2_moe": lambda: T.Lfm2MoeConfig(
        **SIZE, **HEADS, **MOE, layer_types=["conv", "full_attention"], num_dense_layers=1
    ),
    "qwen3_5_moe": lambda: T.Qwen3_5MoeTextConfig(
        **FOUR, **HEADS, **MOE, **LINEAR, head_dim=16, shared_expert_intermediate_size=32
    ),
    "olmo_hybrid": lambda: T.OlmoHybridConfig(**FOUR, **HEADS),
    "kimi_linear": lambda: T.KimiLinearConfig(
        **SIZE, **dict(HEADS, num_key_value_heads=4), **dict(LATENT, q_lora_rank=None), num_local_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, linear_head_dim=16, linear_num_heads=4,
        layer_types=["linear_attention", "full_attention"],
    ),
    "nemotron": lambda: T.NemotronConfig(**SIZE, **HEADS),
    "minimax": lambda: T.MiniMaxConfig(
        **SIZE, **HEADS, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"],
    ),
    "nemotron_h": lambda: T.NemotronHConfig(
        **BARE, **HEADS, layers_block_type=["mamba", "attention"], head_dim=16, mamba_num_heads=8, mamba_head_dim=16,
        ssm_state_size=8, n_groups=1,
    ),
}  # fmt: skip
"""What the engine tells apart beside these."""


def read_table() -> dict[str, str]:
    """The documentation's rows, by architecture."""
    lines = SERVED_PAGE.read_text(encoding="utf-8").splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def cases(fast: list[Any], everything: list[Any]) -> list[Any]:
    """All cases, those that are not fast marked so."""
    one = [case if isinstance(case, tuple) else (case,) for case in everything]
    marks = [() if case in fast else pytest.mark.slow for case in everything]
    return [pytest.param(*values, marks=m, id="-".join(values)) for values, m in zip(one, marks, strict=True)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[..., Any]) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder = made[architecture] = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config({**ARCHITECTURES, **SERVED_TOO}[architecture]())
            with torch.no_grad():  # larger than the default initialisation, so that logits and gradients tell apart
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(4)
            model.save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
        return made[architecture]

    return make


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled rows of many lengths, some beyond the sliding windows."""
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("data") / "rows.csv"
    lines = [f"{i} {' '.join(draw.choices(WORDS, k=draw.randint(1, 40)))},{draw.choice(LABELS)}" for i in range(80)]
    file.write_text("\n".join(["text,label", *lines]) + "\n")
    return file


def trial_of(folder: Path, data: Path, root: Path, method: str) -> TrialConfig:
    tree = {
        "name": "tiny",
        "model": {"id": str(folder)},
        "data": {"train": str(data), "instruction": "classify the intent"},
        "method": {"type": method, **METHODS[method]},
        "optim": {"learning_rate": 5e-3, "batch_size": 8},
        "budget": {"steps": 6},
        "eval": {"every": 3, "max_rows": 8, "max_test_rows": 8, "latency": False},
        "compute": {"num_workers": 0},
        "output": {"root": str(root), "keep_model": method in ("full", "galore", "lisa")},
    }
    return parse(TrialConfig, tree)


def opened(trial: TrialConfig) -> tuple[Base, TaskData]:
    return load_base(trial.model, trial.quantization, device=CPU), load_data(trial.data, load_tokenizer(trial.model))


@pytest.mark.parametrize(("architecture", "method"), cases(FAST_RUNS, [(a, m) for a in ARCHITECTURES for m in METHODS]))
def test_trained_is_published_read_back_and_merged(
    architecture: str, method: str, tiny: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    trial = trial_of(tiny(architecture), rows, tmp_path, method)
    run_trial(trial, LocalSession(tmp_path / "run", device=CPU))

    registry = Registry(tmp_path / "registry")
    record = registry.verify("tiny@1")
    folder = tmp_path / "registry" / "tiny" / "1"
    base, data = opened(trial)
    ids = data.test[0].input_ids
    before = compute_last_logits(base.model, ids)
    adapted = compute_last_logits(load_adapter(base.model, folder), ids)
    merge_adapter(folder, record, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(compute_last_logits(merged, ids), adapted, atol=1e-3, rtol=1e-3)
    if trial.output.keep_model:
        kept = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "tiny" / "model").eval()
        assert (compute_last_logits(kept, ids) - adapted).norm() < (compute_last_logits(kept, ids) - before).norm()


def test_an_int8_layer_takes_latents_of_four_dimensions(
    tiny: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    plain = trial_of(tiny("deepseek_v3"), rows, tmp_path, "lora")
    trial = plain.model_copy(update={"quantization": Int8()})
    run_trial(trial, LocalSession(tmp_path / "run", device=CPU))
    expected = compute_last_logits(opened(plain)[0].model, list(range(5, 25)))
    found = compute_last_logits(opened(trial)[0].model, list(range(5, 25)))
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("architecture", cases(FAST_HOSTS, [*ARCHITECTURES, "llama4_text", "nemotron_h"]))
def test_members_of_a_host_are_their_dedicated_runs(
    architecture: str, tiny: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    trials = {method: trial_of(tiny(architecture), rows, tmp_path, method) for method in ("lora", "dora")}
    base, data = opened(trials["lora"])
    host = TrialHost(base, data, num_slots=2, max_rank=4, token_budget=4096, with_magnitudes=True)
    for name, trial in trials.items():
        host.admit(name, trial)
    losses: dict[str, list[float]] = {name: [] for name in trials}
    while not all(member.done for member in host.members.values()):
        for report in host.step():
            assert report.error is None
            losses[report.name].append(report.loss)
    for name, trial in trials.items():
        alone, data = opened(trial)
        events: list[Event] = []
        session = LocalSession(tmp_path / name, device=CPU, on_event=events.append)
        loop = TrainingLoop(trial, alone, data, session)
        for _ in range(loop.num_steps):
            loop.step()
        expected = [event.loss for event in events if isinstance(event, StepFinished)]
        assert losses[name] == pytest.approx(expected, rel=1e-3), name
        host.export(name, tmp_path / f"{name}-member")
        ids = data.test[0].input_ids
        own = compute_last_logits(loop.module.eval(), ids)
        fresh, _ = opened(trial)
        member = compute_last_logits(load_adapter(fresh.model, tmp_path / f"{name}-member"), ids)
        torch.testing.assert_close(member, own, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("architecture", cases(FAST_LABELS, list(ARCHITECTURES)))
def test_labels_by_trie_are_those_of_one_row_at_a_time(
    architecture: str, tiny: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    base, data = opened(trial_of(tiny(architecture), rows, tmp_path, "lora"))
    assert data.labels is not None
    predict = partial(predict_labels, base.model, list(data.train), LabelTrie(data.labels), pad_id=base.pad_id)
    together, one_by_one = predict(batch_size=32), predict(batch_size=1)
    assert together == one_by_one


def test_the_table_of_what_is_served_names_each_architecture_once() -> None:
    lines = [line for line in SERVED_PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == sorted([*ARCHITECTURES, *SERVED_TOO])


@pytest.mark.parametrize("architecture", cases(FAST_SERVED, [*ARCHITECTURES, *SERVED_TOO]))
def test_what_is_served_are_transformers_own_tokens(
    architecture: str, tiny: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    base = tiny(architecture)
    trial = trial_of(base, rows, tmp_path, "lora")
    outline = open_outline(trial.model, trial.quantization)
    types = sorted({*get_layer_types_and_kwargs(outline.config.get_text_config(decoder=True))[0]})
    obstacle = find_obstacle(outline)
    row = f"| `{architecture}` | {', '.join(types)} | "
    if obstacle:
        assert read_table()[architecture] == f"{row}no: {obstacle} |"
        with pytest.raises(ModelError, match=re.escape(f"{obstacle}; serve it with engine.type=vllm")):
            engine_on(base, tmp_path)
        return
    run_trial(trial, LocalSession(tmp_path / "run", device=CPU))
    engine = engine_on(base, tmp_path / "registry", max_num_seqs=6, kv_cache_tokens=3 * NARROWEST)
    is_ragged = isinstance(engine._core._runner, ModelRunner)
    assert read_table()[architecture] == f"{row}{'ragged' if is_ragged else 'padded'} |"
    draw = random.Random(0)
    prompts = [[draw.randrange(5, 390) for _ in range(length)] for length in (3, 40, NARROWEST - 6, NARROWEST - 4, 21)]
    longer = [*prompts[1], *prompts[0]]

    async def work() -> list[list[int]]:
        jobs = [(prompt, ref) for prompt in prompts for ref in (None, "tiny@1")]
        waiting = [completed(engine, prompt, ref, id=str(i), max_tokens=12) for i, (prompt, ref) in enumerate(jobs)]
        found = [tokens for _, tokens, _ in await asyncio.gather(*waiting)]
        last = [await completed(engine, longer, ref, id=str(ref), max_tokens=12) for ref in (None, "tiny@1")]
        return [*found, *(tokens for _, tokens, _ in last)]

    found = serving(engine, work)
    model: Any = plain(base)
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    of_base = [generate(model, prompt, 12) for prompt in [*prompts, longer]]
    adapted = load_adapter(model, tmp_path / "registry" / "tiny" / "1")
    of_adapter = [generate(adapted, prompt, 12) for prompt in [*prompts, longer]]
    assert (found[0::2], found[1::2]) == (of_base, of_adapter)
    stats = engine.get_stats()
    assert stats.preemptions > 0
    has_states = bool({"linear_attention", "conv", "hybrid"} & {*types})  # which are kept before a prompt's last token
    assert stats.cached_tokens >= 2 * (len(prompts[1]) - has_states)


def generate(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """transformers' own greedy continuation."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
    return found[0, len(prompt) :].tolist()
