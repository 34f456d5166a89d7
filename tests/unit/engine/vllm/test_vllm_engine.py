"""The engine on a vLLM server: its process, what is said to it and what is made of its answers.

`stub_vllm` stands in for vLLM, over a real socket; tests/parity/test_vllm.py does the same with vLLM itself.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file

from rankloom.config.engine import VllmConfig
from rankloom.config.model import ModelConfig
from rankloom.engine.jobs import ReplicaLostError
from rankloom.engine.protocol import Delta, Engine, Grammar, Request, Sampling
from rankloom.engine.vllm import die_with_parent
from rankloom.engine.vllm.engine import VllmEngine
from rankloom.engine.vllm.server import find_vllm, list_arguments, make_completion_body
from rankloom.errors import (
    AdapterNotFoundError,
    ConfigError,
    ModelError,
    OverloadedError,
    RegistryError,
    RequestError,
)
from rankloom.models import load_outline
from rankloom.registry import Registry
from rankloom.registry.checks import CONFIG, WEIGHTS
from stub_vllm.vllm.entrypoints.openai.api_server import DIE, FAIL, SLOW
from stubbed import make_python, publish_probed

T = TypeVar("T")


@pytest.fixture
def python(tmp_path: Path) -> str:
    return make_python(tmp_path)


def serving(base: Path, registry: Path, python: str, work: Callable[[VllmEngine], Awaitable[T]], **settings: Any) -> T:
    config = VllmConfig(**{"python": python, "startup_timeout_s": 60, "max_cpu_loras": 2, "max_loras": 2} | settings)
    outline = load_outline(ModelConfig(id=str(base)), dtype=torch.float32)

    async def run() -> T:
        engine = VllmEngine(outline, Registry(registry), config, threads=3)
        assert isinstance(engine, Engine)
        assert not engine.alive
        await engine.start()
        try:
            return await asyncio.wait_for(work(engine), 60)
        finally:
            await engine.close()
            assert not engine.alive
            assert not engine._server.scratch.exists()

    return asyncio.run(run())


async def completed(
    engine: Engine, prompt: tuple[int, ...] = (5, 30), adapter: str | None = None, id: str = "r", **sampling: Any
) -> tuple[list[int], list[Delta]]:
    settings = Sampling(**{"temperature": 0, "max_tokens": 4, "ignore_eos": True} | sampling)
    deltas = [delta async for delta in engine.generate(Request(id, adapter, prompt, settings))]
    return [token for delta in deltas for token in delta.tokens], deltas


def test_answers_become_deltas(tiny_llama: Path, tmp_path: Path, python: str) -> None:
    async def work(engine: VllmEngine) -> None:
        assert (engine.alive, engine.context) == (True, 128)
        tokens, deltas = await completed(engine)
        assert tokens == [31, 32, 33, 34]
        assert [d.finish for d in deltas] == [None, None, None, "length"]
        assert deltas[-1].cached_tokens == 2
        text = "".join(d.text for d in deltas)
        assert text == engine._base.tokenizer.decode(tokens)
        stats = engine.get_stats()
        assert (stats.generated_tokens, stats.prompt_tokens, stats.cached_tokens) == (4, 0, 2)
        assert (stats.running, stats.waiting, stats.cache_tokens, stats.cache_capacity) == (0, 0, 400, 1600)
        tokens, deltas = await completed(engine, stop=(text[2:4],))
        assert ("".join(d.text for d in deltas), deltas[-1].finish) == (text[:2], "stop")
        assert len(tokens) < 4 or len(text) == 4
        tokens, deltas = await completed(engine, (5, 0), ignore_eos=False)
        assert (tokens, deltas[-1].finish, deltas[-1].text) == ([1], "stop", "")  # 1 is the end of the turn
        for num, top in ((0, []), (3, [20, 19, 21])):
            _, deltas = await completed(engine, logprobs=num)
            (one,) = deltas[0].logprobs
            assert (one.chosen.token, one.chosen.logprob, [each.token for each in one.top]) == (31, -0.5, top)

    serving(tiny_llama, tmp_path / "registry", python, work)


def test_adapters_are_checked_made_plain_loaded_and_unloaded(tiny_llama: Path, tmp_path: Path, python: str) -> None:
    root = tmp_path / "registry"
    ranks = {"lora": 4, "rslora": 12, "adalora": 3, "dora": 8}  # an AdaLoRA's largest
    refs = {kind: publish_probed(tiny_llama, root, tmp_path, kind, rank) for kind, rank in ranks.items()}
    refused = {
        publish_probed(tiny_llama, root, tmp_path, "extracted", 8): r"extracted@1 has .*modules.* engine\.type=bank",
        publish_probed(tiny_llama, root, tmp_path, "wide", 20): r"rank 20, above engine\.max_lora_rank=16",
        publish_probed(tiny_llama, root, tmp_path, "patterns", 7): "seven is no rank",
        publish_probed(tiny_llama, root, tmp_path, "lora", 5, "changed"): "differ by",
        publish_probed(tiny_llama, root, tmp_path, "lora", 0, "unlike"): "differ by",
    }

    async def work(engine: VllmEngine) -> None:
        found = await asyncio.gather(*(completed(engine, (5, 30), refs[kind], kind) for kind in ("lora", "rslora")))
        assert [tokens[:2] for tokens, _ in found] == [[34, 38], [42, 54]]
        assert {each.ref for each in engine.list_resident()} == {refs["lora"], refs["rslora"]}
        await engine.pin(refs["adalora"])
        assert (engine.get_stats().adapter_loads, engine.get_stats().adapter_evictions) == (3, 1)
        async with engine._server._http.get("/v1/models") as answer:
            known = {model["id"] for model in (await answer.json())["data"]}
        assert known == {"base", "zero", *(each.ref for each in engine.list_resident())}
        for ref, reason in refused.items():
            with pytest.raises(RegistryError, match=reason):
                await completed(engine, (5, 30), ref)
        with pytest.raises(AdapterNotFoundError):
            await completed(engine, (5, 30), "none@1")
        with pytest.raises(RequestError, match="exact version"):
            await completed(engine, (5, 30), "lora@champion")
        assert (await completed(engine, (5, 30), refs["adalora"]))[0][0] == 33
        assert engine.get_stats().adapter_failures == len(refused) + 1
        await engine.pin(refs["dora"])
        sent = engine._adapters.get(refs["dora"])
        assert sent is not None
        assert json.loads((sent.folder / CONFIG).read_text())["use_dora"]
        plain, ours = (load_file(folder / WEIGHTS) for folder in (sent.folder, tmp_path / "dora"))
        named = {name: tensor for name, tensor in ours.items() if "magnitude" in name}
        assert named
        assert all(torch.equal(plain[name], tensor) for name, tensor in named.items())

    serving(tiny_llama, root, python, work)


def test_an_adapter_that_vllm_does_nothing_with_is_refused(tiny_llama: Path, tmp_path: Path, python: str) -> None:
    root = tmp_path / "registry"
    ref = publish_probed(tiny_llama, root, tmp_path, "silent", 4)

    async def work(engine: VllmEngine) -> None:
        engine._server.base = ref  # as if the base answered like the adapter
        with pytest.raises(RegistryError, match="does nothing"):
            await completed(engine, (5, 30), ref)

    serving(tiny_llama, root, python, work)


def test_what_is_refused_and_what_fails(tiny_llama: Path, tmp_path: Path, python: str) -> None:
    async def work(engine: VllmEngine) -> None:
        for prompt, reason in (((), "empty"), ((500,), "vocabulary"), ((5,) * 128, "no room"), ((FAIL,), "no prompt")):
            with pytest.raises(RequestError, match=reason):
                await completed(engine, prompt)
        slow = engine.generate(Request("slow", None, (SLOW, 30), Sampling(max_tokens=90, ignore_eos=True)))
        await anext(slow)
        with pytest.raises(OverloadedError, match="1 requests are running"):
            await completed(engine)
        await slow.aclose()  # type: ignore[attr-defined]
        while engine._server.gauges["vllm:num_requests_running"] or not await engine._server._look():
            await engine._server._look()
        assert (await completed(engine))[0]
        stopped = asyncio.create_task(completed(engine, (SLOW, 30), max_tokens=90))
        await asyncio.sleep(0.2)
        await engine.close()
        with pytest.raises(OverloadedError, match="stopping"):
            await stopped
        with pytest.raises(OverloadedError, match="stopping"):
            await completed(engine)

    serving(tiny_llama, tmp_path / "registry", python, work, max_num_seqs=1, max_queue=0)


def test_vllm_is_told_whose_a_prompt_is() -> None:
    for tenant in ("0123abc", None):
        body = make_completion_body(Request("r", None, (5, 30), Sampling(seed=3), tenant), "base", frozenset())
        assert (body.get("cache_salt"), body["seed"]) == (tenant, 3)


@pytest.mark.parametrize(
    ("kind", "key"), [("json", "json"), ("regex", "regex"), ("grammar", "grammar"), ("lark", "grammar")]
)
def test_vllm_is_told_what_a_completion_follows(kind: Any, key: str) -> None:
    sampling = Sampling(grammar=Grammar(kind=kind, text="{}"))
    body = make_completion_body(Request("r", None, (5, 30), sampling), "base", frozenset())
    assert body["structured_outputs"] == {key: "{}"}


def test_a_server_that_ends_is_noticed(tiny_llama: Path, tmp_path: Path, python: str) -> None:
    async def work(engine: VllmEngine) -> None:
        with pytest.raises(ReplicaLostError):
            await completed(engine, (DIE, 30), max_tokens=50)
        while engine.alive:
            await asyncio.sleep(0.01)
        with pytest.raises(ReplicaLostError):
            await completed(engine)

    serving(tiny_llama, tmp_path / "registry", python, work)


def test_a_server_that_does_not_come_up_says_why(tiny_llama: Path, tmp_path: Path, python: str) -> None:
    async def work(_: VllmEngine) -> None:
        raise AssertionError("it started")

    with pytest.raises(ModelError, match="ended before it was ready: ValueError: this model is not for me"):
        serving(tiny_llama, tmp_path / "registry", python, work, args=("--start=fail",))
    with pytest.raises(ModelError, match=r"not ready after engine\.startup_timeout_s=0\.05 seconds"):
        serving(tiny_llama, tmp_path / "registry", python, work, startup_timeout_s=0.05)


def test_the_server_gets_what_the_config_says(tiny_llama: Path, tmp_path: Path, python: str) -> None:
    async def work(engine: VllmEngine) -> list[str]:
        (line,) = [line for line in engine._server._last_lines if line.startswith("options:")]
        return line.split()[1:]

    settings: dict[str, Any] = dict(
        max_num_seqs=5, max_cpu_loras=9, max_loras=3, max_lora_rank=32, max_model_len=100, kv_cache_gib=0.5
    )
    settings |= dict(args=("--enforce-eager",), env={"OMP_NUM_THREADS": "2"})
    options = serving(tiny_llama, tmp_path / "registry", python, work, **settings)
    zero = not torch.cuda.is_available()
    assert {
        f"--model={tiny_llama}", "--max-num-seqs=5", f"--max-cpu-loras={9 + zero}", f"--max-loras={3 + zero}",
        "--max-lora-rank=32", "--max-model-len=100", f"--kv-cache-memory-bytes={2**29}", "--dtype=float32",
        "--enforce-eager", "OMP_NUM_THREADS=2",
    } <= set(options)  # fmt: skip


@pytest.mark.parametrize(("gpus", "share"), [(1, "0.9"), (2, "0.9"), (0.5, "0.45"), (0.25, "0.225")])
def test_a_server_takes_its_part_of_a_gpu(tmp_path: Path, gpus: float, share: str) -> None:
    config = VllmConfig(args=("--gpu-memory-utilization=0.3",))
    options = list_arguments(config, tmp_path, "bfloat16", tmp_path / "socket", on_gpu=True, gpus=gpus)
    assert f"--gpu-memory-utilization={share}" in options
    assert options[-1] == "--gpu-memory-utilization=0.3"  # whoever sets it has the last word
    assert "--max-num-seqs=256" in options
    assert not any("gpu" in option for option in list_arguments(
        VllmConfig(), tmp_path, "float32", tmp_path / "socket", on_gpu=False
    ))  # fmt: skip


def test_an_environment_without_vllm_is_told(monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    monkeypatch.delenv("RANKLOOM_VLLM_PYTHON", raising=False)
    for given, reason in ((None, "not given"), ("/none", "not a program"), (sys.executable, "has no vLLM")):
        with pytest.raises(ConfigError, match=f"engine.python: .*{reason}"):
            find_vllm(given)
    monkeypatch.setenv("RANKLOOM_VLLM_PYTHON", python)
    assert find_vllm(None) == (python, "0.99")


@pytest.mark.parametrize("end", ["killed", "lets go"])
def test_the_leash_ends_a_process_with_its_starter(tmp_path: Path, end: str) -> None:
    (tmp_path / "held.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    held = [sys.executable, die_with_parent.__file__, str(tmp_path), "held"]
    starter = (
        "import subprocess, sys\n"
        f"subprocess.Popen({held!r}, stdin=subprocess.PIPE, start_new_session=True)\n"
        "sys.stdin.readline()\n"
    )
    outer = subprocess.Popen([sys.executable, "-c", starter], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert outer.stdout is not None
    assert outer.stdin is not None
    pid = int(outer.stdout.readline())
    assert _runs(pid)
    if end == "killed":
        outer.kill()
    else:
        outer.stdin.close()
    while _runs(pid):
        time.sleep(0.02)
    outer.wait()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
