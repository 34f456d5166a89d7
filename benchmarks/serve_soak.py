"""An endpoint at full load while everything about it changes: does anything fail, does memory grow?

    python benchmarks/serve_soak.py [--minutes 10] [--registered 1000] [--idle 10000]

A real endpoint on a local Ray with a random two-layer Llama, whose speed does not matter. Three parts:

- `--minutes`: 16 clients stream completions on the base, 12 adapters of which 6 fit in memory, and a route, while
  another client publishes, promotes, begins and ends canaries, and loads and unloads names.
- `--registered`: this many more adapters are published, and requests use each of them twice.
- `--idle`: this many connections stay open, half of them after one request and half without any.

Prints every request that failed, and the memory (RSS) of each process; compares the second third of the minutes with
the last. Exits with 1 if a request failed or memory grew by more than 5 %.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from common import endpoint, machine, tiny_llama, today, workers_below, write_json

CLIENTS, ADAPTERS, RESIDENT = 16, 12, 6
GROWTH = 1.05
PROMPT = "I still have not received my new card, what now?"


@dataclass
class Load:
    """The requests sent, and their results."""

    done: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def ask(self, client: openai.OpenAI, model: str, tokens: int, kind: str) -> None:
        """Stream one completion to its end."""
        try:
            stream = client.completions.create(
                model=model, prompt=PROMPT, max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
            )
            finish = [choice.finish_reason for chunk in stream for choice in chunk.choices][-1]
            if finish != "length":
                raise ValueError(f"ended with {finish}")
            self.done[kind] += 1
        except Exception as error:
            self.failures.append(f"{kind} on {model}: {type(error).__name__}: {error}")


class Memory:
    """Samples the RSS of each of Ray's workers, by name."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(1):
            for name, megabytes in now_mb().items():
                self.samples.setdefault(name, []).append(megabytes)

    def thirds(self) -> dict[str, tuple[float, float]]:
        """Return the medians of the second and the last third of the samples, in MB."""
        self._stop.set()
        self._thread.join()
        found = {}
        for name, sizes in self.samples.items():
            third = len(sizes) // 3
            if third:
                found[name] = statistics.median(sizes[third : 2 * third]), statistics.median(sizes[2 * third :])
        return found


def now_mb() -> dict[str, float]:
    """Return the RSS of the endpoint's processes in MB, by name; the largest if several share a name."""
    sizes: dict[str, float] = {}
    for name, pid in workers_below(os.getpid()):
        part = next((p for p in ("Replica", "Ingress", "Proxy", "Controller") if f":{p}" in name or f"{p}Actor" in name
                     or (f"Serve{p}" in name and p != "Replica")), None)  # fmt: skip
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            if part is not None:
                sizes[part] = max(sizes.get(part, 0), pages * resource.getpagesize() / 2**20)
    return sizes


class Adapters:
    """Random adapters in a registry, published from a prepared folder with new weights."""

    def __init__(self, base: str, root: Path, work: Path) -> None:
        import torch
        from serve_speed import publish

        from rankloom.config.model import ModelConfig, NoQuantization
        from rankloom.models import load_base
        from rankloom.registry import Draft, Registry

        loaded = load_base(ModelConfig(id=base), NoQuantization(), device=torch.device("cpu"))
        publish(loaded, root, work, ADAPTERS, rank=8)
        self.registry, self._work = Registry(root), work
        kept = self.registry.get("a0@1").model_dump()
        self._draft = Draft.model_validate({name: kept[name] for name in Draft.model_fields})

    def publish(self, name: str, like: int) -> str:
        return self.registry.publish(name, self._work / f"a{like}", self._draft).ref


def config_of(base: str, root: Path) -> dict[str, Any]:
    judge = {"min_requests": 1_000_000}  # the benchmark itself begins and ends canaries
    return {
        "base": base, "registry": str(root), "refresh_s": 1.0,
        "routes": {"front": {"canary": {"adapter": "a0", "share": 0.3, "judge": judge}, "fallback": ["base"]}},
        "engine": {"max_num_seqs": 8, "max_cpu_loras": RESIDENT, "kv_cache_tokens": 4096, "prefix_cache_tokens": 2048},
    }  # fmt: skip


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def soak(url: str, base: str, adapters: Adapters, minutes: float) -> dict[str, Any]:
    """Run full load for some minutes, with changes."""
    load, until = Load(), time.monotonic() + 60 * minutes
    memory, changes = Memory(), Counter[str]()

    def stream(seed: int) -> None:
        draw, mine = random.Random(seed), client(url)
        models = [base, "front", *(f"a{i}" for i in range(ADAPTERS))]
        while time.monotonic() < until:
            load.ask(mine, draw.choice(models), draw.randint(8, 64), "stream")

    def change() -> None:
        draw, mine = random.Random(0), client(url)
        while time.monotonic() < until:
            name = f"a{draw.randrange(ADAPTERS)}"
            ref = adapters.publish(name, draw.randrange(ADAPTERS))
            adapters.registry.promote(ref)
            adapters.registry.promote(adapters.publish("a0", draw.randrange(ADAPTERS)), "canary")
            try:
                mine.post("/load_lora_adapter", body={"lora_name": "mine", "lora_path": ref}, cast_to=object)
                load.ask(mine, "mine", 8, "on a loaded name")
                mine.post("/unload_lora_adapter", body={"lora_name": "mine"}, cast_to=object)
            except openai.OpenAIError as error:
                load.failures.append(f"loading {ref}: {error}")
            time.sleep(1)
            adapters.registry.promote("a0@canary" if draw.random() < 0.5 else "a0@champion", "canary")
            adapters.registry.promote("a0@canary")  # ends the canary
            changes["rounds"] += 1
            time.sleep(1)

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        jobs = [pool.submit(change), *(pool.submit(stream, seed) for seed in range(CLIENTS))]
    for job in jobs:
        job.result()
    told = {name: {"second third": round(b), "last third": round(c)} for name, (b, c) in memory.thirds().items()}
    versions = sum(len(adapters.registry.versions(name)) for name in adapters.registry.names())
    return {
        "minutes": minutes, "answered": dict(load.done), "failures": load.failures[:20], "failed": len(load.failures),
        "rounds of changes": changes["rounds"], "versions at the end": versions, "memory_mb": told,
        "grew": [name for name, each in told.items() if each["last third"] > GROWTH * each["second third"]],
    }  # fmt: skip


def walk(url: str, adapters: Adapters, count: int) -> dict[str, Any]:
    """Send requests to this many adapters, twice each."""
    names = [adapters.publish(f"many{i}", i % ADAPTERS).partition("@")[0] for i in range(count)]
    load, mine = Load(), client(url)
    deadline = time.monotonic() + 60
    while not {*names} <= {model.id for model in mine.models.list()} and time.monotonic() < deadline:
        time.sleep(0.5)
    memory, seconds = [now_mb()], []
    for _ in range(2):
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: load.ask(client(url), name, 2, "walk"), names))
        seconds.append(time.monotonic() - began)
        memory.append(now_mb())
    return {
        "registered": count, "answered": dict(load.done), "failures": load.failures[:20], "failed": len(load.failures),
        "seconds a walk": [round(each, 1) for each in seconds],
        "memory_mb": {n: [round(each[n]) for each in memory] for n in memory[0]},
        "grew": [name for name in memory[0] if memory[2][name] > GROWTH * memory[1][name]],
    }  # fmt: skip


def idle(url: str, base: str, count: int) -> dict[str, Any]:
    """Keep this many idle connections open while others send requests."""
    host, port = url.removeprefix("http://").split(":")
    load, mine, held = Load(), client(url), []
    request = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()

    def median_s() -> float:
        seconds = []
        for _ in range(30):
            began = time.monotonic()
            load.ask(mine, base, 1, "beside idle connections")
            seconds.append(time.monotonic() - began)
        return statistics.median(seconds)

    memory, latency_s = [now_mb()], [median_s()]
    try:
        for number in range(count):
            opened = socket.create_connection((host, int(port)), timeout=60)
            held.append(opened)
            if number % 2:
                opened.sendall(request)
                if not opened.recv(4096).startswith(b"HTTP/1.1 200"):
                    load.failures.append(f"connection {number} was refused")
        memory.append(now_mb())
        latency_s.append(median_s())
    finally:
        for opened in held:
            opened.close()
    time.sleep(5)
    memory.append(now_mb())
    latency_s.append(median_s())
    return {
        "connections": len(held), "answered": dict(load.done), "failures": load.failures[:20],
        "failed": len(load.failures),
        "memory_mb, before, with and after": {n: [round(each[n]) for each in memory] for n in memory[0]},
        "median ms of a request, before, with and after": [round(1e3 * each, 1) for each in latency_s],
        "grew": [],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--registered", type=int, default=0)
    parser.add_argument("--idle", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    # limits of this process and of those that it starts
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    figures: dict[str, Any] = {"date": today(), "machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        base = tiny_llama(Path(folder) / "base")
        adapters = Adapters(base, Path(folder) / "registry", Path(folder) / "work")
        adapters.registry.promote("a0@1")
        parts: dict[str, Callable[[str], dict[str, Any]]] = {}
        if given.minutes:
            parts["soak"] = lambda url: soak(url, base, adapters, given.minutes)
        if given.registered:
            parts["walk"] = lambda url: walk(url, adapters, given.registered)
        if given.idle:
            parts["idle"] = lambda url: idle(url, base, given.idle)
        with endpoint(config_of(base, Path(folder) / "registry")) as url:
            for name, part in parts.items():
                figures[name] = part(url)
                print(json.dumps({name: figures[name]}, indent=2), flush=True)
    if given.out:
        write_json(given.out, figures)
    if any(figures[name]["failed"] or figures[name]["grew"] for name in parts):
        sys.exit(1)


if __name__ == "__main__":
    main()
