"""Bases that are computed as transformers computes them: every kind of adapter in one batch, prefixes with states."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from transformers import AutoModelForCausalLM, PretrainedConfig

from rankloom import kernels
from rankloom.adapters.extract import extract_adapter
from rankloom.engine.attention import SequenceChunk
from rankloom.engine.kv_cache import KvCache
from rankloom.engine.padded_cache import forecast_shape
from rankloom.engine.padded_runner import PaddedRunner
from rankloom.engine.protocol import Pooling, Request, Sampling
from served import LINEARS, collect, completed, engine_on, load, plain, publish, serving, with_peft, write_adapter

SIZE = dict(vocab_size=330, pad_token_id=0, eos_token_id=1, bos_token_id=1, hidden_size=32)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
BASES: dict[str, Callable[[], PretrainedConfig]] = {
    "bloom": lambda: T.BloomConfig(**SIZE, n_layer=2, n_head=4),
    "qwen3_5": lambda: T.Qwen3_5TextConfig(
        **SIZE, **HEADS, num_hidden_layers=4, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    "kimi_linear": lambda: T.KimiLinearConfig(
        **SIZE, **dict(HEADS, num_key_value_heads=4), num_hidden_layers=2, linear_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_heads=4, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_local_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32,
    ),
    "mamba": lambda: T.MambaConfig(**SIZE, num_hidden_layers=2, state_size=8),
    "recurrent_gemma": lambda: T.RecurrentGemmaConfig(
        **SIZE, **HEADS, num_hidden_layers=3, head_dim=8, lru_width=32, attention_window_size=16
    ),
}  # fmt: skip
OTHERS: dict[str, Callable[[], PretrainedConfig]] = {
    "mamba2": lambda: T.Mamba2Config(**SIZE, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1),
    "bart": lambda: T.BartConfig(
        **{**SIZE, "hidden_size": 32}, decoder_layers=2, decoder_ffn_dim=64, decoder_attention_heads=4
    ),
}
TARGETS = {
    "bloom": ["query_key_value", "dense_h_to_4h"],
    "qwen3_5": ["q_proj", "in_proj_qkv", "out_proj", "up_proj"],
    "kimi_linear": ["q_proj", "kv_b_proj", "o_proj"],
    "mamba": ["in_proj", "x_proj"],
    "recurrent_gemma": ["linear_x", "linear_out", "q_proj", "up_proj"],
}


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BASES[request.param]())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write_convolutions(base: Path, folder: Path) -> None:
    """Write an adapter extracted from a model whose linears and convolutions changed, also those that are only read."""
    trained = plain(base)
    for name, parameter in trained.named_parameters():
        if any(part in name for part in ("proj", "conv", "linear_x", "linear_out")):
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    extract_adapter(trained, base, 8, folder, "a/base")


@pytest.mark.parametrize(
    ("base", "family", "on_gpu"),
    [*((name, name, False) for name in BASES), ("kimi_linear", "kimi_linear", True)],
    indirect=["base"],
)
def test_adapters_of_every_kind_are_served_in_one_batch(
    base: Path, family: str, on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LINEARS, family, TARGETS[family])
    folders: dict[str | None, Path | None] = {None: None}
    for kind in ("lora", "dora", "extracted"):
        if kind == "extracted" and family != "bloom":  # the others hold what no adapter can have
            write_convolutions(base, tmp_path / kind)
        else:
            write_adapter(base, tmp_path / kind, kind, architecture=family)
        folders[publish(tmp_path / "registry", base, kind, tmp_path / kind)] = tmp_path / kind
    chance = random.Random(0)
    jobs = [
        ([chance.randrange(5, 300) for _ in range(length)], ref, length % 7 + 2)
        for ref in folders
        for length in (1, 2, 19, 33)
    ]
    with kernels.everywhere() if on_gpu else nullcontext():
        engine = engine_on(base, tmp_path / "registry", max_num_batched_tokens=24)

    async def work() -> list[list[int]]:
        waiting = [completed(engine, p, ref, id=str(i), max_tokens=n) for i, (p, ref, n) in enumerate(jobs)]
        return [tokens for _, tokens, _ in await asyncio.gather(*waiting)]

    with kernels.everywhere() if on_gpu else nullcontext():
        found = serving(engine, work)
    assert found == [with_peft(base, folders[ref], prompt, n) for prompt, ref, n in jobs]


@pytest.mark.parametrize("base", list(BASES), indirect=True)
def test_prompts_are_scored_and_embedded_as_by_transformers(base: Path, tmp_path: Path) -> None:
    chance, model = random.Random(2), plain(base)
    prompts = [[chance.randrange(5, 300) for _ in range(length)] for length in (1, 2, 19, 33)]
    engine, mean = engine_on(base, tmp_path, max_num_batched_tokens=24), Pooling("mean", normalize=False)

    async def work() -> list[Any]:
        scored = [completed(engine, p, id=f"s{i}", max_tokens=2, prompt_logprobs=0) for i, p in enumerate(prompts)]
        pooled = [
            collect(engine, Request(f"p{i}", None, tuple(p), Sampling(max_tokens=0), pooling=mean))
            for i, p in enumerate(prompts)
        ]
        return list(await asyncio.gather(asyncio.gather(*scored), asyncio.gather(*pooled)))

    scored, pooled = serving(engine, work)
    for prompt, (_, tokens, deltas), (delta,) in zip(prompts, scored, pooled, strict=True):
        with torch.no_grad():
            found = model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        logprobs_tV = found.logits[0].log_softmax(-1)
        expected = [float(logprobs_tV[at, token]) for at, token in enumerate(prompt[1:])]
        given = [each.logprob for delta in deltas for each in delta.prompt_logprobs]
        assert given == [None, *(pytest.approx(value, abs=1e-3) for value in expected)]
        assert tokens[0] == int(logprobs_tV[-1].argmax())
        embedding = torch.frombuffer(bytearray(delta.embedding), dtype=torch.float32)
        torch.testing.assert_close(embedding, found.hidden_states[-1][0].mean(0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("base", ["qwen3_5", "mamba"], indirect=True)
def test_states_are_kept_where_later_requests_can_continue(base: Path, tmp_path: Path) -> None:
    chance = random.Random(1)
    system, *asked = [[chance.randrange(5, 300) for _ in range(length)] for length in (70, 20, 21, 22)]
    engine = engine_on(base, tmp_path)
    continues = engine._core._runner.continues

    async def work() -> list[tuple[list[int], int]]:
        found = []
        prompts = [*(system + question for question in asked), system + asked[0]]
        for i, prompt in enumerate([*prompts, "turn"]):
            given = [*prompts[-1], *found[-1][0], 7, 8] if prompt == "turn" else prompt
            before = engine.get_stats().cached_tokens
            _, tokens, _ = await completed(engine, given, id=str(i), max_tokens=20)
            assert tokens == with_peft(base, None, given, 20)
            found.append((tokens, engine.get_stats().cached_tokens - before))
        return found

    first, second, third, again, turn = (count for _, count in serving(engine, work))
    assert first == second == 0  # the second one shows where questions part, so the states there are kept
    assert third == (70 if continues else 0)  # one by one, the 22 tokens after it would take longer
    assert again == 70 + 20 - 1
    assert turn == 70 + 20 + 20 - 1


@pytest.mark.parametrize("base", ["qwen3_5"], indirect=True)
def test_a_step_that_fails_in_the_middle_is_computed_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = PaddedRunner(load(base).model)
    cache, tokens = KvCache(runner.shape, 1 << 12), list(range(5, 25))
    for id in ("a", "b"):
        cache.reserve(id, len(tokens))
    runner.forward(cache, [SequenceChunk(id, None, 0, tokens[:6]) for id in ("a", "b")])
    later = [SequenceChunk("a", None, 6, tokens[6:]), SequenceChunk("b", None, 6, tokens[6:7])]
    compute, calls = PaddedRunner._compute, list[Any]()

    def fail_once(self: PaddedRunner, *given: Any, **settings: Any) -> dict[str, Any]:
        calls.append(given)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return compute(self, *given, **settings)

    monkeypatch.setattr(PaddedRunner, "_compute", fail_once)
    with pytest.raises(torch.OutOfMemoryError):
        runner.forward(cache, later)
    found = runner.forward(cache, later)
    runner.close()
    expected = [load(base).model(torch.tensor([own])).logits[0, -1] for own in (tokens, tokens[:7])]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", list(BASES), indirect=True)
def test_what_layers_keep_is_forecast(base: Path) -> None:
    runner = PaddedRunner(load(base).model)
    planned = forecast_shape(load(base).model, torch.float32)
    assert (planned.layers, planned.bytes_per_sequence) == (runner.shape.layers, runner.shape.bytes_per_sequence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "continues", "pads"),
    [("mamba", False, True), ("mamba2", True, True), ("qwen3_5", True, True), ("bloom", True, True),
     ("recurrent_gemma", False, True), ("bart", True, False)],
)  # fmt: skip
def test_what_a_model_needs_is_found(family: str, continues: bool, pads: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({**BASES, **OTHERS}[family]()).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    runner = PaddedRunner(model.to(dtype))
    assert (runner.continues, runner._pads) == (continues, pads)
    runner.close()
