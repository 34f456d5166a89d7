"""The logprobs of a prompt's own tokens are those of PEFT's model, whatever shares the batch and however it is cut."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from fake_graph import fake_graphs
from rankloom import kernels
from rankloom.engine import device_predictor
from rankloom.engine.engine import ServingEngine
from rankloom.engine.protocol import Delta, Request, Sampling
from rankloom.errors import RegistryError
from rankloom.kernels.graphs import GraphCache
from served import GREEDY, collect, completed, engine_on, load, plain, publish, serving, write_adapter

Asked = list[tuple[list[int], str | None, dict[str, Any]]]


@pytest.fixture(scope="module")
def registry(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lora@1`, `dora@1` and `extracted@1`, which changes the head too, on the tiny Llama."""
    root, work, base = tmp_path_factory.mktemp("registry"), tmp_path_factory.mktemp("work"), tiny_model("llama")
    for seed, kind in enumerate(("lora", "dora", "extracted")):
        write_adapter(base, work / kind, kind, seed=seed)
        publish(root, base, kind, work / kind)
    return root


@pytest.fixture(params=["plain", "as on a GPU"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "plain":
        yield
        return
    fake_graphs(monkeypatch)
    monkeypatch.setattr(device_predictor, "GraphCache", lambda _, most: GraphCache(torch.device("cuda"), most))
    with kernels.everywhere():
        yield


def compute_with_peft(base: Path, adapter: Path | None, prompt: list[int]) -> torch.Tensor:
    """Return the logprobs [t, V] after each token."""
    model: Any = plain(base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        logprobs: torch.Tensor = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
    return logprobs


def ask(engine: ServingEngine, asked: Asked) -> list[list[Delta]]:
    async def work() -> list[list[Delta]]:
        waiting = [completed(engine, prompt, ref, id=str(i), **how) for i, (prompt, ref, how) in enumerate(asked)]
        return [deltas for _, _, deltas in await asyncio.gather(*waiting)]

    return serving(engine, work)


def check(deltas: list[Delta], prompt: list[int], expected_tV: torch.Tensor, num_likeliest: int) -> None:
    scored = [each for delta in deltas for each in delta.prompt_logprobs]
    assert [each.token for each in scored] == prompt
    assert (scored[0].logprob, scored[0].top) == (None, ())
    for at, each in enumerate(scored[1:]):
        assert each.logprob == pytest.approx(float(expected_tV[at, each.token]), abs=2e-4)
        values, _ = expected_tV[at].topk(num_likeliest)
        assert [logprob for _, logprob in each.top] == pytest.approx(values.tolist(), abs=2e-4)
        assert [logprob for token, logprob in each.top if token == each.token] in ([], [each.logprob])


@pytest.mark.usefixtures("path")
def test_prompts_are_scored_in_a_mixed_batch(tiny_llama: Path, registry: Path) -> None:
    chance, asked = random.Random(0), list[Any]()
    for length in (1, 2, 40, 17, 64, 5):
        for ref in (None, "lora@1", "dora@1", "extracted@1"):
            how = [{"max_tokens": 0, "prompt_logprobs": 2}, {"max_tokens": 4, "prompt_logprobs": 0, "logprobs": 0}, {}]
            prompt = [chance.randrange(5, 300) for _ in range(length)]
            asked.append((prompt, ref, how[chance.randrange(3)]))
    # small steps, so that prompts come in pieces beside rows that decode
    found = ask(engine_on(tiny_llama, registry, max_num_seqs=5, max_num_batched_tokens=16), asked)
    kinds = Counter[tuple[str, ...]]()
    for deltas, (prompt, ref, how) in zip(found, asked, strict=True):
        folder = None if ref is None else registry / ref.split("@")[0] / "1"
        expected = compute_with_peft(tiny_llama, folder, prompt)
        if "prompt_logprobs" in how:
            check(deltas, prompt, expected, how["prompt_logprobs"])
        tokens = [token for delta in deltas for token in delta.tokens]
        assert len(tokens) == how.get("max_tokens", GREEDY.max_tokens)
        assert deltas[-1].finish == "length"
        if tokens:
            assert tokens[0] == int(expected[-1].argmax())
            assert not any(delta.prompt_logprobs for delta in deltas if delta.tokens)
        kinds[tuple(how)] += 1
    assert min(kinds.values()) > 2
    assert len(kinds) == 3


def test_a_preempted_prompt_is_scored_once(tiny_llama: Path, registry: Path) -> None:
    prompt = [5 + at * at % 290 for at in range(150)]
    # rows that decode outgrow the cache while the prompt is read, a token a step
    asked: Asked = [([5 + at] * 200, None, {"max_tokens": 200}) for at in range(2)]
    asked.append((prompt, None, {"max_tokens": 2, "prompt_logprobs": 1}))
    settings = {"kv_cache_tokens": 1024, "max_num_seqs": 3, "max_num_batched_tokens": 3, "prefix_cache_tokens": 0}
    engine = engine_on(tiny_llama, registry, **settings)
    *_, deltas = ask(engine, asked)
    assert engine.get_stats().preemptions
    assert engine.get_stats().prompt_tokens > 2 * 200 + 150
    check(deltas, prompt, compute_with_peft(tiny_llama, None, prompt), 1)


def test_a_prompt_that_is_kept_is_scored_again(tiny_llama: Path, registry: Path) -> None:
    engine, prompt = engine_on(tiny_llama, registry), tuple(range(10, 90))

    async def work() -> list[Delta]:
        scored = Sampling(max_tokens=0, prompt_logprobs=1)
        await collect(engine, Request("a", None, prompt, Sampling(max_tokens=0)))
        again, plainly = await asyncio.gather(
            collect(engine, Request("b", None, prompt, scored)),
            collect(engine, Request("c", None, prompt, Sampling(max_tokens=0))),
        )
        assert (again[-1].cached_tokens, plainly[-1].cached_tokens) == (0, 79)
        return again

    check(serving(engine, work), list(prompt), compute_with_peft(tiny_llama, None, list(prompt)), 1)


def test_a_prompt_may_fill_the_context_where_nothing_follows(tiny_llama: Path, registry: Path) -> None:
    engine = engine_on(tiny_llama, registry)
    prompt = [5 + at % 90 for at in range(engine.context)]
    (deltas,) = ask(engine, [(prompt, "lora@1", {"max_tokens": 0, "prompt_logprobs": 0})])
    assert sum(len(delta.prompt_logprobs) for delta in deltas) == 512


def test_scores_that_are_not_finite_are_an_adapters_error(tiny_llama: Path, tmp_path: Path) -> None:
    base = load(tiny_llama)
    engine = engine_on(base, tmp_path)
    with torch.no_grad():
        base.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(RegistryError, match="gives logits that are not within"):
        ask(engine, [([5, 6, 7], None, {"max_tokens": 0, "prompt_logprobs": 1})])
