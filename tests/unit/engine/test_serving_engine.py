"""The engine on a tiny model: reuse, preemption, cancellation, seeds, choices, refusals, adapters that come and go."""

from __future__ import annotations

import asyncio
import math
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from rankloom.adapters.probe import record_probe
from rankloom.adapters.weights import load_adapter
from rankloom.config.model import Int8, Nf4, Quantization
from rankloom.engine.jobs import CompletionJob, Prompt, run
from rankloom.engine.model_runner import ModelRunner
from rankloom.engine.protocol import Engine, Request, Sampling
from rankloom.errors import (
    AdapterNotFoundError,
    IncompatibleError,
    ModelError,
    OverloadedError,
    RegistryError,
    RequestError,
)
from served import GREEDY, collect, completed, engine_on, load, publish, serving, with_peft, write_adapter

LONG = list(range(10, 60))


@pytest.fixture(scope="module")
def registry(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lora@1`, `dora@1` and `third@1` on the tiny Llama."""
    root, work, base = tmp_path_factory.mktemp("registry"), tmp_path_factory.mktemp("work"), tiny_model("llama")
    for seed, (name, kind) in enumerate([("lora", "lora"), ("dora", "dora"), ("third", "rslora")]):
        write_adapter(base, work / name, kind, seed=seed)
        publish(root, base, name, work / name)
    return root


def test_it_is_an_engine(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry)
    assert isinstance(engine, Engine)
    assert engine.base_id == str(tiny_llama)
    assert engine.context == 512


def test_a_context_ends_where_rope_would_turn_a_steps_other_rows_too(
    tmp_path: Path, make_tokenizer: Callable[..., Any]
) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    shape = dict(SIZE, vocab_size=400, **SPECIAL, max_position_embeddings=128, original_max_position_embeddings=32)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Phi3Config(**shape, rope_parameters=rope)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    engine = engine_on(tmp_path, tmp_path)
    assert engine.context == 32


def test_a_prefix_is_reused_by_the_same_version_alone(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry)

    async def work() -> None:
        _, first, deltas = await completed(engine, [*LONG, 5], "lora@1")
        assert deltas[-1].cached_tokens == 0
        _, again, deltas = await completed(engine, [*LONG, 5], "lora@1")
        assert (again, deltas[0].cached_tokens, deltas[-1].cached_tokens) == (first, 50, 50)
        _, other, deltas = await completed(engine, [*LONG, 9, 8], "lora@1")
        assert deltas[-1].cached_tokens == 50
        assert other == with_adapter("lora", [*LONG, 9, 8])
        for ref in (None, "dora@1"):
            assert (await completed(engine, [*LONG, 5], ref))[2][-1].cached_tokens == 0
        assert engine.get_stats().cached_tokens == 100

    def with_adapter(name: str, prompt: list[int]) -> list[int]:
        return with_peft(tiny_llama, registry / name / "1", prompt, GREEDY.max_tokens)

    serving(engine, work)


def test_a_prefix_is_reused_by_the_same_tenant_alone(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry)
    prompt = tuple(5 + i % 90 for i in range(100))

    async def work() -> None:
        async def cached(tenant: str | None, id: str = "r") -> int:
            return (await collect(engine, Request(id, "lora@1", prompt, GREEDY, tenant)))[-1].cached_tokens

        for tenant in ("ann", "ben", None):
            assert (await cached(tenant), await cached(tenant)) == (0, 99)
        # at once, they wait for their own alone
        found = await asyncio.gather(*(cached(tenant, f"{tenant}{i}") for i in range(2) for tenant in ("cid", "dot")))
        assert found == [0, 0, 99, 99]

    serving(engine, work)


def test_several_completions_with_a_seed_differ_and_come_again(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry)
    sampling = Sampling(temperature=1, max_tokens=12, seed=7)

    async def texts(*prompts: Prompt, n: int) -> list[str]:
        found = [""] * (len(prompts) * n)
        async for progress in run(engine, CompletionJob("w", "lora@1", prompts, sampling, n, 12)):
            for index, delta in progress.deltas:
                found[index] += delta.text
        return found

    async def work() -> None:
        four = await texts((5, 6, 7), n=4)
        assert len(set(four)) == 4
        assert await texts((5, 6, 7), n=4) == four
        assert await texts((5, 6, 7), n=1) == four[:1]
        assert (await texts((9, 8), (5, 6, 7), n=4))[4:] == four
        assert await texts(*[(5, 6, 7)] * 4, n=1) == four

    serving(engine, work)


def test_requests_that_come_at_once_begin_in_one_step(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry)
    short = GREEDY.model_copy(update={"max_tokens": 1})

    async def work() -> None:
        for turn in (1, 2, 3):
            await asyncio.sleep(0.2)  # until it has nothing to do
            jobs = [collect(engine, Request(f"{turn}-{i}", None, (5, 6, 7 + i), short)) for i in range(6)]
            await asyncio.gather(*jobs)
            assert engine.get_stats().steps == turn

    serving(engine, work)


def test_a_prompt_that_comes_several_times_at_once_is_computed_once(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry)
    prompt = [5 + i % 90 for i in range(100)]

    async def work() -> None:
        jobs = [completed(engine, prompt, ref, id=f"{ref}{i}") for ref in (None, "lora@1") for i in range(4)]
        found = await asyncio.gather(*jobs)
        assert [deltas[-1].cached_tokens for _, _, deltas in found] == [0, 99, 99, 99] * 2
        assert all(tokens == found[0][1] for _, tokens, _ in found[:4])
        assert all(tokens == found[4][1] for _, tokens, _ in found[4:])

    serving(engine, work)
    assert engine.get_stats().prompt_tokens == 2 * 100 + 6


@pytest.mark.parametrize("prefix_tokens", [0, 4096])
def test_rows_that_outgrow_the_cache_wait_and_come_out_the_same(
    tiny_llama: Path, registry: Path, prefix_tokens: int
) -> None:
    engine = engine_on(tiny_llama, registry, kv_cache_tokens=1024, prefix_cache_tokens=prefix_tokens)
    prompts = [[20 + i] * 4 + [7 + j % 200 for j in range(230)] for i in range(4)]

    async def work() -> list[Any]:
        # four rows of 256 fit; grown beyond, two do
        jobs = [completed(engine, prompts[i], refs[i], id=str(i), max_tokens=40) for i in range(4)]
        return await asyncio.gather(*jobs)

    refs = [None, "lora@1", "lora@1", "dora@1"]
    found = serving(engine, work)

    assert engine.get_stats().preemptions > 0
    for prompt, ref, (_, tokens, _) in zip(prompts, refs, found, strict=True):
        folder = None if ref is None else registry / ref.split("@")[0] / "1"
        assert tokens == with_peft(tiny_llama, folder, prompt, 40)


def test_a_client_that_goes_frees_its_place(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry)

    async def work() -> None:
        settings = GREEDY.model_copy(update={"max_tokens": 400})
        stream = engine.generate(Request("a", "lora@1", (5, 6), settings))
        await anext(stream)
        assert engine.get_stats().running == 1
        await stream.aclose()
        task = asyncio.create_task(collect(engine, Request("b", "dora@1", (5, 6), settings)))
        await asyncio.sleep(0.05)
        task.cancel()
        while engine.get_stats().running or engine.get_stats().waiting:
            await asyncio.sleep(0.01)
        assert (await completed(engine, [5, 6], id="a"))[1]
        assert all(adapter.num_running == 0 for adapter in engine.list_resident())

    serving(engine, work)
    assert engine.get_stats().generated_tokens < 400


def test_a_seed_gives_the_same_alone_and_in_company(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry)
    settings = dict(temperature=1.0, max_tokens=20, top_p=0.9)

    async def work() -> None:
        _, alone, _ = await completed(engine, [5, 6, 7], "lora@1", seed=3, **settings)
        company = [completed(engine, [8] * i, None, id=f"c{i}", seed=i, **settings) for i in range(1, 9)]
        (_, among, _), *_ = await asyncio.gather(completed(engine, [5, 6, 7], "lora@1", seed=3, **settings), *company)
        assert among == alone
        assert (await completed(engine, [5, 6, 7], "lora@1", seed=4, **settings))[1] != alone

    serving(engine, work)


def test_a_completion_ends_where_it_should(tiny_llama: Path, registry: Path) -> None:
    base = load(tiny_llama)
    engine = engine_on(base, registry)

    async def work() -> None:
        text, tokens, deltas = await completed(engine, [5, 6, 7], max_tokens=30)
        assert (len(tokens), deltas[-1].finish) == (30, "length")
        assert text == base.tokenizer.decode(tokens, skip_special_tokens=True)
        stop = text[len(text) // 2 :][:3]
        cut, _, deltas = await completed(engine, [5, 6, 7], max_tokens=30, stop=(stop,))
        assert (cut, deltas[-1].finish) == (text[: text.index(stop)], "stop")
        # the end of the turn, made certain by allowing nothing else
        choice = dict(choices=("card",), logprobs=0, ignore_eos=False)
        text, tokens, deltas = await completed(engine, [5, 6, 7], max_tokens=30, **choice)
        assert (text, tokens[-1], deltas[-1].finish) == ("card", base.tokenizer.eos_token_id, "stop")
        _, tokens, deltas = await completed(engine, [5] * 505, max_tokens=30)
        assert (len(tokens), deltas[-1].finish) == (7, "length")  # the context's end

    serving(engine, work)


def test_logprobs_are_of_every_token(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry)

    async def work() -> None:
        _, tokens, deltas = await completed(engine, [5, 6, 7], "lora@1", logprobs=3)
        entries = [entry for delta in deltas for entry in delta.logprobs]
        assert [entry.chosen.token for entry in entries] == tokens
        assert all(entry.top[0] == entry.chosen and len(entry.top) == 3 for entry in entries)  # greedy
        assert all(sum(math.exp(top.logprob) for top in entry.top) <= 1 + 1e-6 for entry in entries)

    serving(engine, work)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_choice_is_the_one_that_is_likeliest_step_by_step(
    tiny_llama: Path, registry: Path, logprobs: int | None
) -> None:
    from rankloom.data.render import Row
    from rankloom.evals.labels import LabelTrie, predict_labels

    base = load(tiny_llama)
    choices = ("card_lost", "card_found", "check_balance", "transfer", "yes", "yes sir")
    end = base.tokenizer.eos_token_id
    ids = {c: [*base.tokenizer(c, add_special_tokens=False).input_ids, end] for c in choices}
    prompts = [[5 + i, 30 + i, 9] for i in range(6)]
    rows = [Row([*p, end], [0, 0, 0, 1], 3, "") for p in prompts]
    expected = predict_labels(base.model, rows, LabelTrie(ids), pad_id=0, batch_size=6)
    engine = engine_on(base, registry)

    async def work() -> list[Any]:
        settings = dict(choices=choices, logprobs=logprobs, max_tokens=20)
        return await asyncio.gather(*(completed(engine, p, id=str(i), **settings) for i, p in enumerate(prompts)))

    assert [text for text, _, _ in serving(engine, work)] == expected


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request("a", None, (), GREEDY), "prompt: empty"),
        (Request("a", None, (10**6,), GREEDY), "outside of the vocabulary"),
        (Request("a", None, (5,) * 512, GREEDY), "no room"),
    ],
)
def test_what_can_not_be_served_is_refused(tiny_llama: Path, registry: Path, request_: Request, match: str) -> None:
    engine = engine_on(tiny_llama, registry)

    async def work() -> None:
        with pytest.raises(RequestError, match=match):
            await collect(engine, request_)

    serving(engine, work)


def test_more_adapters_than_places(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry, max_cpu_loras=1)
    names = ["lora", "dora", "third"]

    async def work() -> None:
        jobs = [completed(engine, [5, 6, 7, i], f"{names[i % 3]}@1", id=str(i)) for i in range(9)]
        for i, (_, tokens, _) in enumerate(await asyncio.gather(*jobs)):
            folder = registry / names[i % 3] / "1"
            assert tokens == with_peft(tiny_llama, folder, [5, 6, 7, i], GREEDY.max_tokens)
        assert len(engine.list_resident()) == 1

    serving(engine, work)
    assert engine.get_stats().adapter_evictions >= 2


def test_a_pinned_adapter_stays(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry, max_cpu_loras=2)

    async def work() -> None:
        await engine.pin("lora@1")
        for ref in ("dora@1", "third@1", "dora@1"):
            await completed(engine, [5, 6], ref)
        assert [(r.ref, r.pinned) for r in engine.list_resident()] == [("lora@1", True), ("dora@1", False)]
        assert all(r.bytes > 1000 for r in engine.list_resident())
        await engine.pin("third@1")
        with pytest.raises(OverloadedError, match="unpin another"):
            await engine.pin("dora@1")
        await engine.unpin("lora@1")
        await engine.pin("dora@1")
        await engine.unpin("third@1")
        with pytest.raises(AdapterNotFoundError):
            await engine.pin("nowhere@1")

    serving(engine, work)


def test_a_bad_adapter_fails_its_own_requests_alone(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base, root = tiny_model("llama"), tmp_path / "registry"
    for name, kind in (("good", "lora"), ("silent", "silent"), ("changed", "lora"), ("bare", "lora")):
        write_adapter(base, tmp_path / name, kind)
    publish(root, base, "good", tmp_path / "good")
    publish(root, base, "silent", tmp_path / "silent")
    publish(root, base, "bare", tmp_path / "bare", probe=False)
    publish(tmp_path / "scratch", base, "changed", tmp_path / "changed")  # its probe, and then other weights
    weights = tmp_path / "changed" / "adapter_model.safetensors"
    save_file({name: t * 1.5 for name, t in load_file(weights).items()}, weights)
    publish(root, base, "changed", tmp_path / "changed", probe=False)
    write_adapter(tiny_model("qwen"), tmp_path / "foreign", "lora", architecture="qwen")
    publish(root, tiny_model("qwen"), "foreign", tmp_path / "foreign")
    engine = engine_on(base, root)

    async def work() -> list[Any]:
        refs = ["good@1", "silent@1", "changed@1", "bare@1", "foreign@1", "missing@1", "good@7", None]
        jobs = (completed(engine, [5, 6, 7], ref, id=str(i)) for i, ref in enumerate(refs))
        return await asyncio.gather(*jobs, return_exceptions=True)

    good, silent, changed, bare, foreign, missing, no_version, plain = serving(engine, work)
    assert good[1] == with_peft(base, tmp_path / "good", [5, 6, 7], GREEDY.max_tokens)
    assert plain[1] == with_peft(base, None, [5, 6, 7], GREEDY.max_tokens)
    for error, kind, match in (
        (silent, RegistryError, "does nothing"),
        (changed, RegistryError, "differ"),
        (bare, RegistryError, "probe"),
        (foreign, IncompatibleError, "own base"),
        (missing, AdapterNotFoundError, "missing"),
        (no_version, AdapterNotFoundError, "no version 7"),
    ):
        assert isinstance(error, kind)
        assert match in str(error)
    assert engine.get_stats().adapter_failures == 6


def test_a_refused_version_is_not_fetched_again_at_once(tiny_llama: Path, tmp_path: Path) -> None:
    write_adapter(tiny_llama, tmp_path / "silent", "silent")
    publish(tmp_path / "registry", tiny_llama, "silent", tmp_path / "silent")
    engine = engine_on(tiny_llama, tmp_path / "registry")

    async def work() -> None:
        messages = []
        for number in range(20):
            with pytest.raises(RegistryError, match=r"silent@1.*does nothing") as error:
                await completed(engine, [5, 6, 7], "silent@1", id=str(number))
            messages.append(str(error.value))
        with pytest.raises(RegistryError, match="does nothing"):
            await engine.pin("silent@1")
        assert len(set(messages)) == 1
        assert str(tmp_path) not in messages[0]

    serving(engine, work)
    assert engine.get_stats().adapter_failures < 5  # after a second it is tried again


@pytest.mark.parametrize(
    "ref", ["../lora@1", "/lora@1", "lora\0@1", "l" * 10_000, "", "lora@-1", "lora", "lora@champion"]
)
def test_hostile_names_are_refused(tiny_llama: Path, registry: Path, ref: str) -> None:
    engine = engine_on(tiny_llama, registry)

    async def work() -> None:
        for work in (completed(engine, [5, 6], ref), engine.pin(ref)):
            with pytest.raises(RequestError, match="adapter") as error:
                await work
            assert len(str(error.value)) < 500

    serving(engine, work)


def test_a_full_queue_refuses_and_goes_on(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry, max_num_seqs=1, max_queue=1)

    async def work() -> list[Any]:
        jobs = [completed(engine, [5, 6], id=str(i)) for i in range(4)]
        found = await asyncio.gather(*jobs, return_exceptions=True)
        assert (await completed(engine, [5, 6], id="later"))[1]
        return found

    found = serving(engine, work)
    assert [isinstance(f, OverloadedError) for f in found] == [False, False, True, True]


def test_closing_ends_what_is_under_way(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry)

    async def work() -> None:
        request = Request("a", None, (5,), Sampling(max_tokens=500, ignore_eos=True))
        job = asyncio.create_task(collect(engine, request))
        await asyncio.sleep(0.05)
        await engine.close()
        with pytest.raises(OverloadedError, match="stopping"):
            await job
        with pytest.raises(OverloadedError, match="stopping"):
            await collect(engine, request)

    serving(engine, work)


def test_closing_while_its_thread_takes_in_what_came_ends_it(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry)

    def close() -> None:  # what `close` does, at the instant when its wake-up is taken in with the rest
        engine._admission.stopping = True
        engine._inbox.put(lambda: None)

    async def work() -> None:
        both = threading.Event()
        engine._inbox.put(lambda: both.wait() and None)
        engine._inbox.put(close)
        both.set()
        await asyncio.to_thread(engine._thread.join, 20)
        ended = not engine.alive
        engine._inbox.put(lambda: None)  # else the test itself would wait for ever
        assert ended

    serving(engine, work)


@pytest.mark.parametrize("quantization", [Nf4(), Int8()], ids=["nf4", "int8"])
def test_a_quantised_base(tiny_llama: Path, tmp_path: Path, quantization: Quantization) -> None:
    write_adapter(tiny_llama, tmp_path / "a", "lora")
    ref = publish(tmp_path / "registry", tiny_llama, "a", tmp_path / "a", quantization=quantization)
    engine = engine_on(load(tiny_llama, quantization), tmp_path / "registry")

    async def work() -> list[Any]:
        return await asyncio.gather(
            completed(engine, [5, 6, 7], ref, id="a"), completed(engine, [5, 6, 7], None, id="b")
        )

    (_, adapted, _), (_, plain, _) = serving(engine, work)
    assert len(adapted) == len(plain) == GREEDY.max_tokens
    assert adapted != plain


SIZE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=8),
        MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=4),
        Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=8, sliding_window=3),
        Phi3Config(**SIZE, **SPECIAL, num_key_value_heads=2),
        GPTNeoXConfig(**SIZE),
    ],
    ids=lambda config: config.model_type,
)
def test_other_families(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # so that a difference shows
    ModelRunner(model).close()  # compares with the model's own logits


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_family_that_the_engine_does_not_fit_is_refused(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # so that a difference shows
    with pytest.raises(ModelError, match="can't be served"):
        ModelRunner(model)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_thousand_registered_adapters_take_the_memory_of_a_few(tiny_llama: Path, tmp_path: Path) -> None:
    write_adapter(tiny_llama, tmp_path / "a", "wide")
    loaded = load(tiny_llama)
    record_probe(load_adapter(load(tiny_llama).model, tmp_path / "a"), [7, 50, 101, 9], tmp_path / "a")
    refs = [publish(tmp_path / "registry", loaded, f"a{i}", tmp_path / "a", probe=False) for i in range(1000)]
    engine = engine_on(loaded, tmp_path / "registry", max_cpu_loras=8)
    sizes: list[float] = []

    async def work() -> None:
        for start in range(0, len(refs), 20):
            some = refs[start : start + 20]
            await asyncio.gather(*(completed(engine, [5, 6], ref, id=ref, max_tokens=2) for ref in some))
            sizes.append(resident_mb())

    serving(engine, work, limit_s=300)
    assert engine.get_stats().adapter_loads == 1000
    assert len(engine.list_resident()) == 8
    # after the first 200 nothing grows but what the allocator keeps
    assert sizes[-1] - sizes[10] < 0.05 * sizes[10]
