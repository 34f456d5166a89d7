"""Overhead of an idle endpoint: the time to one token over HTTP, minus the time to one token in the engine alone.

    python benchmarks/serve_overhead.py [--base tiny|MODEL] [--requests 200]

One client sends one request after the other, one token each, on a local Ray, and alternates between two ways:
"itself" is the ingress's own HTTP server, which `rankloom serve` opens on a Ray of its own; "proxy" is Ray Serve's HTTP
proxy before it, as on a cluster. The base is by default a random two-layer Llama: the time of a larger one varies
by more than the overhead. Prints the medians in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import tiny_llama

PROMPT = "The capital of France is"


def engine_alone(base: str, count: int) -> list[float]:
    """Return the seconds per request of the engine in this process."""
    import torch

    from rankloom.config.engine import EngineConfig
    from rankloom.config.model import ModelConfig, NoQuantization
    from rankloom.engine.engine import ServingEngine
    from rankloom.engine.jobs import CompletionJob, run
    from rankloom.engine.protocol import Sampling
    from rankloom.models import load_base
    from rankloom.registry import Registry

    torch.set_num_threads(1)
    loaded = load_base(ModelConfig(id=base), NoQuantization(), device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as root:
        engine = ServingEngine(loaded, Registry(root), EngineConfig())

        async def measure() -> list[float]:
            await engine.start()
            seconds = []
            for number in range(count):
                began = time.perf_counter()
                job = CompletionJob(
                    id=str(number), adapter=None, prompts=(PROMPT,), sampling=Sampling(temperature=0.0), max_tokens=1
                )
                async for _ in run(engine, job):
                    pass
                seconds.append(time.perf_counter() - began)
            await engine.close()
            return seconds

        return asyncio.run(measure())


def over_http(base: str, count: int) -> dict[str, list[float]]:
    """Return way -> seconds per request."""
    from common import endpoint, find_free_port

    address = "127.0.0.1", find_free_port()
    seconds: dict[str, list[float]] = {"itself": [], "proxy": []}
    with (
        tempfile.TemporaryDirectory() as root,
        endpoint({"base": base, "registry": root, "refresh_s": 60}, address) as url,
    ):
        at = {"itself": f"{address[0]}:{address[1]}", "proxy": url.removeprefix("http://")}
        connections = {way: http.client.HTTPConnection(address) for way, address in at.items()}
        body: dict[str, Any] = {"model": base, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
        for _ in range(count):
            for way, connection in connections.items():
                began = time.perf_counter()
                connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
                answer = connection.getresponse()
                text = answer.read()
                assert answer.status == 200, text
                seconds[way].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--requests", type=int, default=200)
    given = parser.parse_args()
    warm = 20
    with tempfile.TemporaryDirectory() as scratch:
        base = tiny_llama(Path(scratch) / "model") if given.base == "tiny" else given.base
        alone = engine_alone(base, given.requests + warm)
        found = {"engine": alone} | over_http(base, given.requests + warm)
    medians = {way: 1e3 * statistics.median(seconds[warm:]) for way, seconds in found.items()}
    print(json.dumps({f"{way}_ms": round(ms, 2) for way, ms in medians.items()} | {"requests": given.requests}))
    for way in ("itself", "proxy"):
        print(f"overhead asked at {way}: {medians[way] - medians['engine']:.2f} ms")


if __name__ == "__main__":
    main()
