"""What a GPU computes, on a CPU with fake CUDA graphs: the same tokens as the plain path, whatever is asked for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, PreTrainedConfig

from fake_graph import fake_graphs
from rankloom import kernels
from rankloom.engine import device_predictor
from rankloom.engine.device_predictor import DevicePredictor, round_rows
from rankloom.engine.engine import ServingEngine
from rankloom.engine.kv_pool import PAGE, KvPool
from rankloom.engine.predictor import PlainPredictor
from rankloom.errors import RegistryError
from rankloom.kernels.graphs import GraphCache
from served import completed, engine_on, publish, serving, write_adapter

SIZE = dict(
    vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 1},
    "cut": {"temperature": 0.8, "seed": 2, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    "spread": {"temperature": 5.0, "seed": 3, "top_p": 0.999},
    "punished": {"temperature": 0.7, "seed": 4, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "told": {"logprobs": 2},
    "stopped": {"stop": ("a", "e", "st"), "max_tokens": 30},
    "chosen": {"choices": ("alpha", "beta", "alps"), "ignore_eos": False},
}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines compute as on a GPU."""
    fake_graphs(monkeypatch)
    monkeypatch.setattr(device_predictor, "GraphCache", lambda _, most: GraphCache(torch.device("cuda"), most))
    with kernels.everywhere():
        yield


@pytest.fixture(scope="module")
def registry(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lora@1` and `dora@1` on the tiny Llama."""
    root, work, base = tmp_path_factory.mktemp("registry"), tmp_path_factory.mktemp("work"), tiny_model("llama")
    for seed, kind in enumerate(("lora", "dora")):
        write_adapter(base, work / kind, kind, seed=seed)
        publish(root, base, kind, work / kind)
    return root


def answers(engine: ServingEngine, jobs: list[tuple[list[int], str | None, dict[str, Any]]]) -> list[Any]:
    async def work() -> list[Any]:
        waiting = [completed(engine, prompt, ref, id=str(i), **how) for i, (prompt, ref, how) in enumerate(jobs)]
        return await asyncio.gather(*waiting)

    return serving(engine, work)


@pytest.mark.parametrize("refs", [(None,), (None, "lora@1", None, "dora@1")], ids=["base", "adapters"])
def test_a_gpus_tokens_are_the_plain_paths(
    tiny_llama: Path,
    registry: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    refs: tuple[str | None, ...],
) -> None:
    monkeypatch.setattr("rankloom.engine.sampling.CANDIDATES", 16)
    monkeypatch.setattr(device_predictor, "CANDIDATES", 16)  # so that some rows look beyond them
    chance = random.Random(0)
    lengths = [1, 3, 20, PAGE - 3, PAGE, 2 * PAGE - 5, 40, 2, 9]
    jobs = [
        ([chance.randrange(5, 300) for _ in range(n)], refs[i % len(refs)], dict(SAMPLINGS[name]))
        for i, (n, name) in enumerate(zip(lengths * 3, [*SAMPLINGS] * 4, strict=False))
    ]
    settings = {"max_num_seqs": 6, "max_num_batched_tokens": 64, "kv_cache_tokens": 8 * PAGE}
    expected = answers(engine_on(tiny_llama, registry, **settings), jobs)
    request.getfixturevalue("fast")
    engine = engine_on(tiny_llama, registry, **settings)
    predictor = engine._core._predictor
    assert isinstance(predictor, DevicePredictor)
    found = answers(engine, jobs)
    for (text, tokens, deltas), (same_text, same_tokens, same_deltas) in zip(found, expected, strict=True):
        assert (text, tokens) == (same_text, same_tokens)
        for ours, theirs in zip(deltas, same_deltas, strict=True):
            assert [each.chosen.token for each in ours.logprobs] == [each.chosen.token for each in theirs.logprobs]
    assert predictor.graphs.is_on
    assert predictor.graphs.num_recorded >= 1
    assert engine._core._cache.held == 0


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZE, head_dim=16, sliding_window=16),
        GptOssConfig(**SIZE, head_dim=16, sliding_window=16, num_local_experts=4, num_experts_per_tok=2),
    ],
    ids=lambda config: config.model_type,
)
def test_windows_caps_and_sinks_are_the_plain_paths(
    config: PreTrainedConfig, tmp_path: Path, make_tokenizer: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data *= 4  # so that a difference shows
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    jobs: list[Any] = [([5 + i % 90 for i in range(n)], None, {}) for n in (1, 12, 40, PAGE + 5)]
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_tokens": 8 * PAGE}
    expected = answers(engine_on(tmp_path, tmp_path / "registry", **settings), jobs)
    request.getfixturevalue("fast")
    engine = engine_on(tmp_path, tmp_path / "registry", **settings)
    assert isinstance(engine._core._predictor, DevicePredictor)
    assert [tokens for _, tokens, _ in answers(engine, jobs)] == [tokens for _, tokens, _ in expected]


@pytest.mark.usefixtures("fast")
def test_an_engine_of_one_sequence_at_a_time_is_fast_too(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry, max_num_seqs=1)
    assert isinstance(engine._core._predictor, DevicePredictor)


@pytest.mark.usefixtures("fast")
def test_rows_that_outgrow_the_pool_wait_and_come_out_the_same(tiny_llama: Path, registry: Path) -> None:
    prompts = [[5 + i % 90] * (PAGE - 6 + i) for i in range(4)]
    jobs: list[Any] = [(prompt, None, {"max_tokens": 20}) for prompt in prompts]
    roomy = answers(engine_on(tiny_llama, registry), jobs)
    narrow = engine_on(tiny_llama, registry, kv_cache_tokens=3 * PAGE, prefix_cache_tokens=1024)
    assert isinstance(narrow._core._cache, KvPool)
    assert [tokens for _, tokens, _ in answers(narrow, jobs)] == [tokens for _, tokens, _ in roomy]
    assert narrow.get_stats().preemptions > 0
    assert narrow.get_stats().prompt_tokens == sum(map(len, prompts))  # what was kept is not computed again


@pytest.mark.usefixtures("fast")
def test_a_step_that_is_computed_in_parts_draws_the_same(
    tiny_llama: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Any] = [([5 + i, *range(40, 50)], None, SAMPLINGS["cut"] | {"seed": i}) for i in range(5)]
    whole = answers(engine_on(tiny_llama, registry), jobs)
    predict = DevicePredictor.predict

    def limited(self: DevicePredictor, chunks: Any, inputs: Any) -> Any:
        if sum(chunk.count for chunk in chunks) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, chunks, inputs)

    engine = engine_on(tiny_llama, registry)
    monkeypatch.setattr(DevicePredictor, "predict", limited)
    assert [tokens for _, tokens, _ in answers(engine, jobs)] == [tokens for _, tokens, _ in whole]


@pytest.mark.usefixtures("fast")
def test_logits_that_are_not_sound_end_their_own_request(
    tiny_llama: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(tiny_llama, registry)
    runner = engine._core._runner
    compute = runner.compute

    def broken(route: Any, ids_N: torch.Tensor, *args: Any) -> torch.Tensor:
        return compute(route, ids_N, *args).masked_fill((ids_N == 77)[:, None].any(), torch.nan)

    monkeypatch.setattr(runner, "compute", broken)

    async def work() -> None:
        with pytest.raises(RegistryError, match="not within"):
            await completed(engine, [77], temperature=1.0, top_p=0.5)
        await completed(engine, [5, 6])

    serving(engine, work)


@pytest.mark.usefixtures("fast")
def test_what_gives_other_logits_or_fails_is_not_used(
    tiny_llama: Path, registry: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode = device_predictor.PagedRows.attend
    for attend, said in (
        (lambda *args: decode(*args) * 2, "gives other logits"),
        (lambda *_: 1 / 0, "the fast path fails"),
    ):
        monkeypatch.setattr(device_predictor.PagedRows, "attend", attend)
        engine = engine_on(tiny_llama, registry)
        assert isinstance(engine._core._predictor, PlainPredictor)
        assert said in caplog.text
        engine._core.close(RegistryError("done"))


@pytest.mark.usefixtures("fast")
def test_a_pool_of_one_page_is_a_pool(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry, kv_cache_tokens=PAGE)
    assert isinstance(engine._core._cache, KvPool)
    jobs: list[Any] = [([5 + i, 6, 7], None, {}) for i in range(3)]  # one after the other
    assert [len(tokens) for _, tokens, _ in answers(engine, jobs)] == [12] * 3


def test_rows_are_rounded_up() -> None:
    assert [round_rows(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 64)] == [1, 2, 4, 8, 8, 16, 16, 24, 64]
