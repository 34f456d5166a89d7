"""The engine's mixed batch gives, token for token, what PEFT gives one request at a time: greedy, fp32."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankloom import kernels
from rankloom.banks.served_adapter import fold
from rankloom.banks.served_bank import AdapterShare
from rankloom.engine.adapter_cache import loading
from rankloom.engine.attention import SequenceChunk
from rankloom.engine.kv_cache import KvCache
from rankloom.engine.model_runner import ModelRunner
from rankloom.registry.checks import WEIGHTS
from served import completed, engine_on, load, plain, publish, serving, with_peft, write_adapter

KINDS = {
    "llama": ["lora", "rank1", "wide", "rslora", "dora", "adalora", "patterns", "extracted"],
    "qwen": ["lora", "dora", "extracted"],
    "gpt2": ["lora", "dora", "adalora", "extracted"],
}


@pytest.mark.parametrize("architecture", list(KINDS))
def test_a_mixed_batch_gives_what_peft_gives_one_by_one(
    tiny_model: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    base, registry, folders = tiny_model(architecture), tmp_path / "registry", {}
    refs: dict[str | None, Path | None] = {None: None}
    for seed, kind in enumerate(KINDS[architecture]):
        folders[kind] = tmp_path / kind
        write_adapter(base, folders[kind], kind, architecture=architecture, seed=seed)
        refs[publish(registry, base, kind, folders[kind])] = folders[kind]
    chance = random.Random(0)
    jobs = [
        (ref, [chance.randrange(5, 300) for _ in range(chance.randint(1, 30))], chance.randint(1, 20))
        for ref in [*refs, *refs]
    ]
    # few rows and small steps, so that requests wait, join and leave, and prompts come in pieces
    engine = engine_on(base, registry, max_num_seqs=6, max_num_batched_tokens=16, prefix_cache_tokens=0)

    async def job(index: int) -> list[int]:
        ref, prompt, num_tokens = jobs[index]
        await asyncio.sleep(0.01 * (index % 5))
        _, tokens, _ = await completed(engine, prompt, ref, id=str(index), max_tokens=num_tokens)
        return tokens

    async def work() -> list[list[int]]:
        return list(await asyncio.gather(*(job(i) for i in range(len(jobs)))))

    found = serving(engine, work)

    expected = [with_peft(base, refs[ref], prompt, num_tokens) for ref, prompt, num_tokens in jobs]
    assert found == expected
    assert len({tuple(with_peft(base, folder, [9, 8, 7], 8)) for folder in refs.values()}) == len(refs)


def test_compiled_adapters_and_those_in_slots_give_what_loose_ones_give(tiny_llama: Path, tmp_path: Path) -> None:
    kinds = ["lora", "rank1", "wide", "rslora", "dora", "extracted", "patterns"]
    for kind in kinds:
        write_adapter(tiny_llama, tmp_path / kind, kind)
    runners = [ModelRunner(load(tiny_llama).model) for _ in range(2)]
    runners[0].bank.compiles = False
    with kernels.everywhere():
        runners.append(ModelRunner(load(tiny_llama).model))
    adapters_of = []
    for runner in runners:
        adapters = [fold(runner._model, tmp_path / kind) for kind in kinds]
        for adapter in adapters:
            runner.bank.admit(adapter)
        adapters_of.append([None, *adapters])
    chance = random.Random(0)
    for _ in range(12):
        count = chance.randint(2, 9)
        prompts = [[chance.randrange(5, 300) for _ in range(chance.choice([1, 1, 1, 2, 12]))] for _ in range(count)]
        chosen = [chance.randrange(len(kinds) + 1) for _ in prompts]
        found = []
        for runner, adapters in zip(runners, adapters_of, strict=True):
            cache = KvCache(runner.shape, 1 << 16)
            chunks = [
                SequenceChunk(str(i), adapters[which], 0, prompt)
                for i, (which, prompt) in enumerate(zip(chosen, prompts, strict=True))
            ]
            for chunk in chunks:
                cache.reserve(chunk.id, chunk.count)
            found.append(runner.forward(cache, chunks))
        for fast in found[1:]:
            torch.testing.assert_close(fast, found[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("noise", "num_rounded"), [(0, 0), (loading.NOISE, 1), (1e9, 2)])
def test_an_adapter_is_integers_where_its_probe_shows_no_difference(
    noise: float, num_rounded: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, jobs = tmp_path / "registry", {}
    for name, strength in (("mild", 0.02), ("strong", 3)):
        write_adapter(tiny_llama, tmp_path / name, "lora")
        weights = load_file(tmp_path / name / WEIGHTS)
        save_file({key: weight * strength for key, weight in weights.items()}, tmp_path / name / WEIGHTS)
        jobs[publish(registry, tiny_llama, name, tmp_path / name)] = tmp_path / name
    monkeypatch.setattr(loading, "NOISE", noise)
    engine, prompt = engine_on(tiny_llama, registry), [9, 8, 7, 6, 5, 4, 3, 2]

    async def work() -> list[list[int]]:
        texts = [completed(engine, prompt, ref, id=ref, max_tokens=20) for ref in jobs]
        return [tokens for _, tokens, _ in await asyncio.gather(*texts)]

    found = serving(engine, work)
    sizes = sorted(adapter.bytes for adapter in engine.list_resident())
    assert len(sizes) == 2
    largest = sum(weight.nbytes for weight in weights.values())
    assert sum(size < 0.6 * largest for size in sizes) == num_rounded
    if noise <= loading.NOISE:
        assert found == [with_peft(tiny_llama, folder, prompt, 20) for folder in jobs.values()]


def test_a_removed_bank_leaves_the_model_as_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    base, ids = load(tiny_llama), torch.tensor([[4, 5, 6]])
    write_adapter(tiny_llama, tmp_path / "a", "extracted")
    adapter = fold(base.model, tmp_path / "a")
    runner = ModelRunner(base.model)
    runner.bank.admit(adapter)
    runner.bank.route([AdapterShare(adapter, 3, 1)])
    runner.close()
    with torch.no_grad():
        torch.testing.assert_close(base.model(ids).logits, plain(tiny_llama)(ids).logits)
    assert not [name for name, module in base.model.named_modules() if "forward" in vars(module)]
