"""vLLM's engine against rankloom's own and PEFT, on a real vLLM server.

It needs an environment that vLLM is installed in: RANKLOOM_VLLM_PYTHON=vllm-env/bin/python names its interpreter.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from rankloom.config.engine import EngineConfig, VllmConfig
from rankloom.config.model import ModelConfig
from rankloom.engine.engine import ServingEngine
from rankloom.engine.forward import ForwardJob, ForwardProgress
from rankloom.engine.jobs import ReplicaLostError
from rankloom.engine.protocol import Delta, Engine, Request
from rankloom.engine.vllm.engine import VllmEngine
from rankloom.engine.vllm.server import PYTHON
from rankloom.errors import IncompatibleError, RegistryError, RequestError
from rankloom.models import load_outline, locate_folder
from rankloom.registry import Registry
from rankloom.registry.checks import WEIGHTS
from served import GREEDY, load, publish, with_peft, write_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no environment with vLLM"),
]
T = TypeVar("T")
SERVED = ["lora", "rslora", "adalora", "patterns", "dora"]
REFUSED = ["extracted", "wide", "silent"]
RESIDENT = 5
MODEL = ModelConfig(id="builtin:smollm2")


@dataclass
class Sides:
    """Both engines, on the same registry."""

    loop: asyncio.AbstractEventLoop
    vllm: VllmEngine
    bank: ServingEngine
    base: Path
    registry: Path
    folders: dict[str, Path]
    refs: dict[str, str]

    def run(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 120))

    def on_both(self, work: Callable[[Engine], Awaitable[T]]) -> tuple[T, T]:
        """(vLLM's, the bank's)."""
        return self.run(work(self.vllm)), self.run(work(self.bank))


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    root, folders, refs = tmp_path_factory.mktemp("registry"), {}, {}
    base = locate_folder(MODEL)
    loaded = load(base)
    for kind in (*SERVED, *REFUSED):
        folders[kind] = tmp_path_factory.mktemp("adapters") / kind
        write_adapter(base, folders[kind], kind)
        refs[kind] = publish(root, load(base), kind, folders[kind])
    loop, registry = asyncio.new_event_loop(), Registry(root)
    config = VllmConfig(max_cpu_loras=RESIDENT, max_loras=RESIDENT, max_model_len=512, args=("--enforce-eager",))
    vllm = VllmEngine(load_outline(ModelConfig(id=str(base)), dtype=torch.float32), registry, config, threads=1)
    bank = ServingEngine(loaded, registry, EngineConfig())
    loop.run_until_complete(vllm.start())
    loop.run_until_complete(bank.start())
    yield Sides(loop, vllm, bank, base, root, folders, refs)
    loop.run_until_complete(vllm.close())
    loop.run_until_complete(bank.close())
    loop.close()


PROMPT = "Question: what should I do about a lost card?\nAnswer:"
numbers = iter(range(10**6))


def request(engine: Engine, adapter: str | None, **sampling: Any) -> AsyncIterator[Delta]:
    settings = GREEDY.model_copy(update=sampling)
    return engine.generate(Request(f"r{next(numbers)}", adapter, tuple(engine.tokenize(PROMPT)), settings))


async def completed(engine: Engine, adapter: str | None, **sampling: Any) -> tuple[str, list[int], list[Delta]]:
    deltas = [delta async for delta in request(engine, adapter, **sampling)]
    return "".join(d.text for d in deltas), [t for d in deltas for t in d.tokens], deltas


def test_a_mixed_batch_gives_the_tokens_and_likelihoods_of_the_bank_and_of_peft(sides: Sides) -> None:
    async def all_at_once(engine: Engine) -> list[tuple[str, list[int], list[Delta]]]:
        work = [completed(engine, adapter, logprobs=5) for adapter in [None, *(sides.refs[kind] for kind in SERVED)]]
        return await asyncio.gather(*work)

    vllm, bank = sides.on_both(all_at_once)
    assert [found[:2] for found in vllm] == [found[:2] for found in bank]
    prompt = sides.vllm.tokenize(PROMPT)
    for kind, (_, tokens, deltas), (_, _, ours) in zip([None, *SERVED], vllm, bank, strict=True):
        folder = None if kind is None else sides.folders[kind]
        assert tokens == with_peft(sides.base, folder, prompt, GREEDY.max_tokens), kind
        mine, its = ([t for d in found for t in d.logprobs] for found in (ours, deltas))
        assert [t.chosen.piece for t in its] == [t.chosen.piece for t in mine]
        for a, b in zip(its, mine, strict=True):
            assert len(a.top) == 5
            assert a.chosen.logprob == pytest.approx(b.chosen.logprob, abs=2e-3), kind
            assert [t.logprob for t in a.top] == pytest.approx([t.logprob for t in b.top], abs=2e-3), kind
    assert len({tuple(tokens) for _, tokens, _ in vllm}) == 1 + len(SERVED)


@pytest.mark.parametrize(
    "sampling",
    [
        {"stop": (" the", "bank")},
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"ignore_eos": False, "max_tokens": 40},
        {"choices": ("call the bank", "wait")},
        {"logprobs": 0},
    ],
)
def test_a_request_means_the_same_to_both(sides: Sides, sampling: dict[str, Any]) -> None:
    (text, tokens, deltas), (expected, as_well, ours) = sides.on_both(
        lambda engine: completed(engine, None, **sampling)
    )
    assert deltas[-1].finish == ours[-1].finish
    if "choices" in sampling:  # vLLM may spell a choice in other tokens, and so prefer another
        assert text in sampling["choices"]
    else:
        assert (text, tokens) == (expected, as_well)
    if "logprobs" in sampling:
        assert all(t.top == () for delta in deltas for t in delta.logprobs)
        assert sum(len(delta.logprobs) for delta in deltas) == len(tokens)


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("kind", [None, "lora"])
def test_a_prompts_logprobs_are_those_of_the_bank(sides: Sides, kind: str | None, max_tokens: int) -> None:
    adapter = None if kind is None else sides.refs[kind]
    asked = {"prompt_logprobs": 2, "logprobs": 2, "max_tokens": max_tokens}
    (text, tokens, deltas), (expected, as_well, ours) = sides.on_both(
        lambda engine: completed(engine, adapter, **asked)
    )
    assert (text, tokens, deltas[-1].finish) == (expected, as_well, ours[-1].finish)
    its, mine = ([each for delta in found for each in delta.prompt_logprobs] for found in (deltas, ours))
    assert [each.token for each in its] == [each.token for each in mine] == sides.vllm.tokenize(PROMPT)
    assert (its[0].logprob, its[0].top) == (None, ())
    for a, b in zip(its[1:], mine[1:], strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=2e-3)
        assert [value for _, value in a.top] == pytest.approx([value for _, value in b.top], abs=2e-3)


async def forwarded(engine: VllmEngine, path: str, adapter: str | None, **body: Any) -> list[ForwardProgress]:
    return [p async for p in engine.forward(ForwardJob(f"f{next(numbers)}", adapter, path, {"model": "m", **body}))]


def test_what_its_own_server_takes_passes_through(sides: Sides) -> None:
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"} <= sides.vllm.routes.keys()
    assert "/v1/embeddings" not in sides.vllm.routes  # the model generates
    chat, asked = "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    assert {"logit_bias", "min_tokens", "chat_template_kwargs", "cache_salt"} <= set(sides.vllm.routes[chat])
    ref, expected = sides.refs["dora"], sides.run(completed(sides.vllm, sides.refs["dora"]))[0]
    common = {"prompt": PROMPT, "max_tokens": GREEDY.max_tokens, "temperature": 0, "ignore_eos": True}
    (whole,) = sides.run(forwarded(sides.vllm, "/v1/completions", ref, **common, min_tokens=2))
    assert whole.body is not None
    assert (whole.body["choices"][0]["text"], whole.body["model"]) == (expected, "m")
    assert (whole.num_tokens, whole.num_ends) == (GREEDY.max_tokens, 1)
    parts = sides.run(forwarded(sides.vllm, "/v1/completions", ref, **common, stream=True))
    assert "".join(p.body["choices"][0]["text"] for p in parts if p.body) == expected
    assert (sum(p.num_tokens for p in parts), sum(p.num_ends for p in parts)) == (GREEDY.max_tokens, 1)
    assert parts[-1].prompt_tokens == len(sides.vllm.tokenize(PROMPT))

    found = []
    for wanted in ("yes", "no"):
        bias = {str(sides.vllm.tokenize(wanted)[0]): 100}
        choice = {"structured_outputs": {"choice": ["yes", "no"]}, "logit_bias": bias}
        (answer,) = sides.run(forwarded(sides.vllm, chat, ref, **asked, max_tokens=60, **choice))
        assert answer.body is not None
        found.append(answer.body["choices"][0]["message"]["content"])
    assert found == ["yes", "no"]
    parts = sides.run(forwarded(sides.vllm, "/v1/responses", None, input="Hi", max_output_tokens=4, stream=True))
    assert (parts[0].event, parts[-2].event) == ("response.created", "response.completed")
    assert sum(p.num_tokens for p in parts) == 4
    (tokens,) = sides.run(forwarded(sides.vllm, "/tokenize", None, prompt=PROMPT, add_special_tokens=False))
    assert tokens.body is not None
    assert tokens.body["tokens"] == sides.vllm.tokenize(PROMPT)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(RequestError, match="not a multimodal model"):
        sides.run(forwarded(sides.vllm, chat, ref, messages=[{"role": "user", "content": [image]}]))
    assert not sides.vllm._admission.open


def test_a_seed_repeats(sides: Sides) -> None:
    async def three(engine: Engine) -> list[list[int]]:
        settings = {"temperature": 1.0, "top_p": 0.95}
        return [(await completed(engine, None, **settings, seed=seed))[1] for seed in (1, 1, 2)]

    first, again, other = sides.run(three(sides.vllm))
    assert first == again != other


def test_a_prompt_is_computed_once(sides: Sides) -> None:
    async def twice() -> int:
        for _ in range(2):
            long = tuple(sides.vllm.tokenize(PROMPT)) * 20
            deltas = [d async for d in sides.vllm.generate(Request("long", None, long, GREEDY))]
        return deltas[-1].cached_tokens

    assert sides.run(twice()) > 0


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("extracted", r"extracted@1 has .*whole modules.*, but vLLM serves LoRA and DoRA on .* engine.type=bank"),
        ("wide", r"rank 20, above engine.max_lora_rank=16"),
        ("silent", "does nothing"),
    ],
)
def test_what_can_not_be_served_is_refused(sides: Sides, kind: str, reason: str) -> None:
    for attempt in (completed(sides.vllm, sides.refs[kind]), sides.vllm.pin(sides.refs[kind])):
        with pytest.raises(RegistryError, match=reason):
            sides.run(attempt)
    assert sides.run(completed(sides.vllm, sides.refs["lora"]))[1]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_names_of_a_wrapped_checkpoint_are_the_model_s(sides: Sides, tmp_path: Path, kind: str) -> None:
    prompt = sides.vllm.tokenize(PROMPT)
    write_renamed(sides.folders[kind], tmp_path / "wrapped", "model.layers", "model.language_model.layers")
    write_renamed(sides.folders[kind], tmp_path / "other", "model.layers", "visual.layers")
    server = sides.vllm._server
    server.load("wrapped", tmp_path / "wrapped")
    try:
        sides.run(completed(sides.vllm, sides.refs[kind]))
        assert server.get_likeliest("wrapped", prompt) == pytest.approx(server.get_likeliest(sides.refs[kind], prompt))
    finally:
        server.unload("wrapped")
    with pytest.raises(RegistryError, match=r"adapter other: .* no place for \d+ .*none of them.*visual\.layers\.0\."):
        server.load("other", tmp_path / "other")
    assert sides.run(completed(sides.vllm, sides.refs[kind]))[1]


def write_renamed(folder: Path, copy: Path, old: str, new: str) -> None:
    shutil.copytree(folder, copy)
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})


def test_another_base_s_adapter_is_refused(sides: Sides, tiny_llama: Path, tmp_path: Path) -> None:
    write_adapter(tiny_llama, tmp_path / "other", "lora")
    with pytest.raises(IncompatibleError, match="over its own base"):
        sides.run(completed(sides.vllm, publish(sides.registry, tiny_llama, "other", tmp_path / "other")))


def test_a_client_that_goes_ends_its_request_there(sides: Sides) -> None:
    async def leave() -> None:
        stream = request(sides.vllm, None, max_tokens=400)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        while not await sides.vllm._server._look() or sides.vllm._server.gauges["vllm:num_requests_running"]:
            await asyncio.sleep(0.1)

    sides.run(leave())
    assert sides.vllm._server.gauges["vllm:generation_tokens_total"] < 5000
    assert sides.vllm.get_stats().running == 0


def test_evicted_adapters_are_unloaded_there(sides: Sides, tmp_path: Path) -> None:
    more = []
    for number in range(3):
        write_adapter(sides.base, tmp_path / f"more{number}", "lora", seed=10 + number)
        more.append(publish(sides.registry, load(sides.base), f"more{number}", tmp_path / f"more{number}"))
    evicted = sides.vllm.get_stats().adapter_evictions
    for ref in (*more, *(sides.refs[kind] for kind in SERVED)):
        sides.run(completed(sides.vllm, ref))
    assert sides.vllm.get_stats().adapter_evictions >= evicted + 3
    resident = {each.ref for each in sides.vllm.list_resident()}
    assert len(resident) == RESIDENT

    async def known() -> set[str]:
        async with sides.vllm._server._http.get("/v1/models") as answer:
            return {model["id"] for model in (await answer.json())["data"]}

    assert sides.run(known()) == {"base", "zero", *resident}
    assert len([f for f in sides.vllm._server.scratch.iterdir() if f.is_dir() and f.name != "zero"]) == RESIDENT


def test_dora_leaves_the_base_s_biases_as_they_are(sides: Sides, tmp_path: Path) -> None:
    """Qwen 2 has them on q, k and v, of which vLLM makes one linear; the adapter is on q and v alone."""
    base, root = tmp_path / "qwen", tmp_path / "registry"
    shape = Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=49152, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(shape)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=0.5 if name.endswith("bias") else 0.1)
    model.save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sides.base / file, base)
    refs = {}
    for kind in ("dora", "lora"):
        write_adapter(base, tmp_path / kind, kind, architecture="qwen")
        refs[kind] = publish(root, load(base), kind, tmp_path / kind)
    config = VllmConfig(max_cpu_loras=2, max_loras=2, max_model_len=128, kv_cache_gib=0.1, args=("--enforce-eager",))
    engine = VllmEngine(load_outline(ModelConfig(id=str(base)), dtype=torch.float32), Registry(root), config, threads=1)

    async def serve() -> list[list[int]]:
        await engine.start()
        try:
            work = (completed(engine, ref) for ref in (None, *refs.values()))
            return [tokens for _, tokens, _ in await asyncio.gather(*work)]
        finally:
            await engine.close()

    prompt = engine.tokenize(PROMPT)
    found = sides.loop.run_until_complete(serve())
    for kind, tokens in zip((None, *refs), found, strict=True):
        folder = None if kind is None else tmp_path / kind
        assert tokens == with_peft(base, folder, prompt, GREEDY.max_tokens), kind


def test_a_server_that_dies_is_noticed(sides: Sides) -> None:
    """The last test: there is none after it."""
    process = sides.vllm._server._process
    assert process is not None
    assert sides.vllm.alive

    async def killed() -> None:
        async for _ in request(sides.vllm, None, max_tokens=400):
            os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(ReplicaLostError):
        sides.run(killed())
    process.wait()
    assert not sides.vllm.alive
