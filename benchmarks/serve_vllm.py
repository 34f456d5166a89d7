"""Served tokens/s with many adapters in one batch, side by side in one run: rankloom's engine and vLLM.

    RANKLOOM_VLLM_PYTHON=vllm-env/bin/python python benchmarks/serve_vllm.py [--rounds 3] [--tokens 32] [--threads 1]

Both engines run behind one protocol, as in a replica, on one registry, the same cores and an equal number of threads
for arithmetic; vLLM's front end adds its own. At each number of concurrent requests, each with its own adapter on all
linear layers: both engines without and with adapters, and vLLM over HTTP without streaming, which is its least work per
token. All generate the same number of tokens for the same prompts, greedily. The sides take turns, round by round,
while the other is idle. No prefix is reused: vLLM's blocks are longer than the prompts. Rates are per second of wall
clock and of CPU time; vLLM's CPU time covers its processes and this one, which reads the answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import torch
import transformers
from common import machine, today, write_json
from serve_speed import TOPICS, medians, publish, ratio

from rankloom.config.engine import EngineConfig, VllmConfig
from rankloom.config.model import ModelConfig, NoQuantization
from rankloom.engine.engine import ServingEngine
from rankloom.engine.protocol import Engine, Request, Sampling
from rankloom.engine.vllm.engine import VllmEngine
from rankloom.engine.vllm.server import make_completion_body
from rankloom.models import load_base, load_outline
from rankloom.registry import Registry

CPU = torch.device("cpu")


def requests(engine: Engine, prompts: Sequence[str], refs: Sequence[str | None], num_tokens: int) -> list[Request]:
    sampling = Sampling(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    pairs = zip(prompts, refs, strict=False)
    return [Request(str(i), ref, tuple(engine.tokenize(prompt)), sampling) for i, (prompt, ref) in enumerate(pairs)]


async def streamed(engine: Engine, work: Sequence[Request]) -> list[list[int]]:
    async def one(request: Request) -> list[int]:
        return [token async for delta in engine.generate(request) for token in delta.tokens]

    return await asyncio.gather(*(one(request) for request in work))


async def whole(engine: VllmEngine, work: Sequence[Request]) -> list[list[int]]:
    server = engine._server

    async def one(request: Request) -> list[int]:
        body = make_completion_body(request, request.adapter or server.base, frozenset()) | {"stream": False}
        del body["stream_options"]
        async with server._http.post("/v1/completions", json=body) as answer:
            tokens: list[int] = (await answer.json())["choices"][0]["token_ids"]
            return tokens

    return await asyncio.gather(*(one(request) for request in work))


def cpu_s(group: int) -> float:
    """Return the CPU seconds of a process group's living processes."""
    ticks = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            ticks += int(fields[11]) + int(fields[12]) if int(fields[2]) == group else 0
    return ticks / os.sysconf("SC_CLK_TCK")


Rates = dict[int, dict[str, list[tuple[float, float]]]]


async def measure(options: argparse.Namespace, root: Path, refs: Sequence[str]) -> Rates:
    """Return tokens per second of wall clock and of CPU time, by number of requests, side and round."""
    torch.set_num_threads(options.threads)
    most, registry = max(options.at), Registry(root)
    bank = ServingEngine(
        load_base(ModelConfig(), NoQuantization(), device=CPU),
        registry,
        EngineConfig(max_num_seqs=most, prefix_cache_tokens=0),
    )
    config = VllmConfig(
        max_num_seqs=most, max_cpu_loras=most, max_loras=most, max_lora_rank=options.rank, args=options.vllm_args
    )
    vllm = VllmEngine(load_outline(ModelConfig(), dtype=torch.float32), registry, config, threads=options.threads)
    began = time.monotonic()
    await vllm.start()
    await bank.start()
    print(f"vLLM {vllm._server.version} was up after {time.monotonic() - began:.0f} s", flush=True)
    for ref in refs:
        await bank.pin(ref)
        await vllm.pin(ref)
    prompts = [f"Question {i}: what should I do about {TOPICS[i % 8]} at my bank?\nAnswer:" for i in range(most)]
    assert vllm._server._process is not None
    group = vllm._server._process.pid
    rates: Rates = {at: {} for at in options.at}
    for index in range(options.rounds + 1):
        for at in options.at:
            tokens = options.tokens if index else 4  # the first round warms up
            plain = requests(bank, prompts[:at], [None] * at, tokens)
            adapted = requests(bank, prompts[:at], refs, tokens)
            sides: dict[str, Callable[[], Awaitable[list[list[int]]]]] = {
                "bank base": lambda plain=plain: streamed(bank, plain),
                "bank adapters": lambda adapted=adapted: streamed(bank, adapted),
                "vllm base": lambda plain=plain: streamed(vllm, plain),
                "vllm adapters": lambda adapted=adapted: streamed(vllm, adapted),
                "vllm adapters, not streamed": lambda adapted=adapted: whole(vllm, adapted),
            }
            found = {}
            for name, side in sides.items():
                wall, cpu, its = time.perf_counter(), time.process_time(), cpu_s(group)
                found[name] = await side()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                cpu += cpu_s(group) - its if name.startswith("vllm") else 0
                if index:
                    rates[at].setdefault(name, []).append((at * tokens / wall, at * tokens / cpu))
            assert all(len(row) == tokens for rows in found.values() for row in rows)
            if index:
                same = sum(a == b for a, b in zip(found["bank adapters"], found["vllm adapters"], strict=True))
                print(f"round {index}, {at} at once: {same} of {at} completions have equal tokens", flush=True)
                print({name: [round(rate, 1) for rate in found[-1]] for name, found in rates[at].items()}, flush=True)
    await bank.close()
    await vllm.close()
    return rates


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--tokens", type=int, default=32, help="tokens to generate per request")
    arguments.add_argument(
        "--rank", type=int, default=16, choices=[8, 16, 32, 64], help="rank of the adapters, and vLLM's highest"
    )
    arguments.add_argument("--at", type=int, nargs="+", default=[1, 8, 16], help="concurrent requests")
    arguments.add_argument("--threads", type=int, default=1, help="threads of each side's arithmetic")
    arguments.add_argument("--vllm-args", nargs="*", default=[], help="more options for vLLM's server")
    arguments.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = arguments.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "registry"
        base = load_base(ModelConfig(), NoQuantization(), device=CPU)
        refs = publish(base, root, Path(scratch) / "work", max(options.at), options.rank)
        del base
        rates = asyncio.run(measure(options, root, refs))
    ours = "bank adapters"
    figures = {
        "date": today(),
        "machine": machine(),
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "tokens_per_s": {at: {name: medians(found) for name, found in sides.items()} for at, sides in rates.items()},
        "bank_over": {
            at: {
                name: {clock: ratio(sides[ours], found, which) for which, clock in enumerate(("wall", "cpu"))}
                for name, found in sides.items()
                if name.startswith("vllm adapters")
            }
            for at, sides in rates.items()
        },
    }
    print(json.dumps(figures, indent=2))
    if options.out:
        write_json(options.out, figures)


if __name__ == "__main__":
    main()
