"""Embeddings are transformers' hidden states, pooled: of the base and of adapters, whatever shares the batch."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from openai import OpenAI

from endpoint import listening
from one_engine import OneEngine
from rankloom.config import parse
from rankloom.config.serve import ServeConfig
from rankloom.engine.engine import ServingEngine
from rankloom.engine.protocol import Delta, Pooling, Request, Sampling
from rankloom.errors import RegistryError, RequestError
from rankloom.gateway.gateway import Gateway
from rankloom.registry import Registry
from served import collect, completed, engine_on, load, plain, publish, serving, write_adapter

KINDS: list[Any] = ["mean", "last", "cls"]
NOTHING = Sampling(max_tokens=0)


def publish_adapters(base: Path, root: Path, work: Path, architecture: str = "llama") -> None:
    """Publish `lora@1` and `dora@1`."""
    for seed, kind in enumerate(("lora", "dora")):
        write_adapter(base, work / kind, kind, architecture=architecture, seed=seed)
        publish(root, base, kind, work / kind)


@pytest.fixture(scope="module")
def registry(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lora@1` and `dora@1` on the tiny Llama."""
    root = tmp_path_factory.mktemp("registry")
    publish_adapters(tiny_llama, root, tmp_path_factory.mktemp("work"))
    return root


def embed_with_peft(base: Path, adapter: Path | None, prompt: list[int], kind: str) -> torch.Tensor:
    """Return the pooled hidden states [D]."""
    model: Any = plain(base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        hidden_tD = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    pooled: torch.Tensor = {"mean": hidden_tD.mean(0), "last": hidden_tD[-1], "cls": hidden_tD[0]}[kind]
    return pooled


def unpack(embedding: bytes) -> torch.Tensor:
    return torch.tensor(struct.unpack(f"<{len(embedding) // 4}f", embedding))


async def embed(engine: ServingEngine, id: str, ref: str | None, prompt: list[int], pooling: Pooling) -> torch.Tensor:
    (delta,) = await collect(engine, Request(id, ref, tuple(prompt), NOTHING, pooling=pooling))
    assert (delta.text, delta.tokens, delta.finish) == ("", (), "stop")
    return unpack(delta.embedding)


@pytest.mark.parametrize("architecture", ["llama", "qwen", "gpt2"])
def test_a_mixed_batch_gives_what_transformers_gives_one_by_one(
    tiny_model: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    base, chance = tiny_model(architecture), random.Random(0)
    publish_adapters(base, tmp_path / "registry", tmp_path / "work", architecture)
    jobs = [
        (ref, [chance.randrange(5, 300) for _ in range(chance.choice([1, 2, 9, 40]))], KINDS[number % 3])
        for number, ref in enumerate([None, "lora@1", "dora@1", None] * 4)
    ]
    # few rows and small steps, so that prompts come in pieces, beside rows that decode
    engine = engine_on(base, tmp_path / "registry", max_num_seqs=5, max_num_batched_tokens=16)

    async def work() -> tuple[list[torch.Tensor], list[Any]]:
        embedding = [
            embed(engine, str(i), ref, prompt, Pooling(kind, normalize=False))
            for i, (ref, prompt, kind) in enumerate(jobs)
        ]
        decoding = [completed(engine, [9, 8, 7], ref, id=f"d{ref}", max_tokens=30) for ref in (None, "lora@1")]
        found, decoded = await asyncio.gather(asyncio.gather(*embedding), asyncio.gather(*decoding))
        alone = [await completed(engine, [9, 8, 7], ref, max_tokens=30) for ref in (None, "lora@1")]
        assert [tokens for _, tokens, _ in decoded] == [tokens for _, tokens, _ in alone]
        return list(found), decoded

    found, _ = serving(engine, work)
    for embedding_D, (ref, prompt, kind) in zip(found, jobs, strict=True):
        folder = None if ref is None else tmp_path / "registry" / ref.split("@")[0] / "1"
        torch.testing.assert_close(embedding_D, embed_with_peft(base, folder, prompt, kind), atol=2e-4, rtol=1e-3)


def test_it_is_cut_and_scaled_to_length_one(tiny_llama: Path, registry: Path) -> None:
    engine, prompt = engine_on(tiny_llama, registry), [5, 6, 7, 8]
    expected_D = embed_with_peft(tiny_llama, None, prompt, "mean")

    async def work() -> None:
        whole_D = await embed(engine, "a", None, prompt, Pooling("mean"))
        torch.testing.assert_close(whole_D, expected_D / expected_D.norm(), atol=1e-5, rtol=1e-4)
        cut_D = await embed(engine, "b", None, prompt, Pooling("mean", 5))
        torch.testing.assert_close(cut_D, expected_D[:5] / expected_D[:5].norm(), atol=1e-5, rtol=1e-4)
        with pytest.raises(RequestError, match=f"dimensions: 65 is above {len(expected_D)}"):
            await embed(engine, "c", None, prompt, Pooling("mean", 65))

    serving(engine, work)


def test_a_preempted_prompt_is_pooled_once(tiny_llama: Path, registry: Path) -> None:
    prompt = [5 + at * at % 290 for at in range(150)]
    settings = {"kv_cache_tokens": 1024, "max_num_seqs": 3, "max_num_batched_tokens": 3, "prefix_cache_tokens": 0}
    engine = engine_on(tiny_llama, registry, **settings)

    async def work() -> torch.Tensor:
        # rows that decode outgrow the cache while the prompt is read, a token a step
        decoding = [completed(engine, [5 + at] * 200, id=f"d{at}", max_tokens=200) for at in range(2)]
        *_, found = await asyncio.gather(*decoding, embed(engine, "e", None, prompt, Pooling("mean", normalize=False)))
        assert engine.get_stats().preemptions
        assert engine.get_stats().prompt_tokens > 2 * 200 + 150
        return found  # type: ignore[return-value]

    expected_D = embed_with_peft(tiny_llama, None, prompt, "mean")
    torch.testing.assert_close(serving(engine, work), expected_D, atol=2e-4, rtol=1e-3)


def test_a_kept_prefix_is_not_missed(tiny_llama: Path, registry: Path) -> None:
    engine, prompt = engine_on(tiny_llama, registry), list(range(10, 90))

    async def work() -> torch.Tensor:
        await collect(engine, Request("a", None, tuple(prompt), NOTHING))
        return await embed(engine, "b", None, prompt, Pooling("mean", normalize=False))

    expected_D = embed_with_peft(tiny_llama, None, prompt, "mean")
    torch.testing.assert_close(serving(engine, work), expected_D, atol=2e-4, rtol=1e-3)


def test_one_that_is_not_finite_is_an_adapters_error(tiny_llama: Path, tmp_path: Path) -> None:
    base = load(tiny_llama)
    engine = engine_on(base, tmp_path)
    with torch.no_grad():
        base.model.model.norm.weight.fill_(float("inf"))

    async def work() -> list[Delta]:
        return await collect(engine, Request("a", None, (5, 6), NOTHING, pooling=Pooling("mean")))

    with pytest.raises(RegistryError, match="the base: gives an embedding that is not finite"):
        serving(engine, work)


@pytest.mark.parametrize("kind", KINDS)
def test_the_official_client_gets_them(tiny_llama: Path, registry: Path, kind: str) -> None:
    base = load(tiny_llama)
    replicas, texts = OneEngine(base, Registry(registry)), ["my card was lost", "größe", "the weather is fine today"]
    config = parse(ServeConfig, {"base": base.id, "pooling": kind})
    with listening(Gateway(config, Registry(registry), replicas)) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        for model, folder in (("base", None), ("lora@1", registry / "lora" / "1")):
            answer = client.embeddings.create(model=model, input=texts, extra_body={"normalize": False})
            ids = [base.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
            again = client.embeddings.create(model=model, input=ids, encoding_format="float")
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
            for one, other, prompt in zip(answer.data, again.data, ids, strict=True):
                expected_D = embed_with_peft(tiny_llama, folder, prompt, kind)
                torch.testing.assert_close(torch.tensor(one.embedding), expected_D, atol=2e-4, rtol=1e-3)
                unit_D = expected_D / expected_D.norm()
                torch.testing.assert_close(torch.tensor(other.embedding), unit_D, atol=2e-4, rtol=1e-3)
    asyncio.run(replicas.engine.close())
