"""Time between tokens of free requests beside eight constrained ones, and beside eight more free ones.

    python benchmarks/serve_constrained.py [--rounds 5] [--tokens 48] [--free 8] [--beside 8]

One engine, one base, no adapters. In each round the free requests run twice: beside as many other free ones, and
beside requests that follow a JSON schema of nested objects, so that both have the same batch. The gaps between a free
request's tokens are timed where its stream is read; a round's figure is their median, and the median of the rounds'
ratios counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import machine, today, write_json

from rankloom.config.engine import EngineConfig
from rankloom.config.model import ModelConfig, NoQuantization
from rankloom.engine.engine import ServingEngine
from rankloom.engine.protocol import Grammar, Request, Sampling
from rankloom.models import load_base
from rankloom.registry import Registry

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "amount": {"type": "number"},
        "kind": {"enum": ["card", "cash", "loan"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "amount", "kind", "tags"],
    "additionalProperties": False,
}
SCHEMA = json.dumps({"type": "array", "items": ITEM, "minItems": 500})
"""Longer than any request here: a constrained row stays for a whole round."""


async def time_gaps(engine: ServingEngine, name: str, prompt: str, sampling: Sampling) -> list[float]:
    """Return the seconds between a request's deltas."""
    at: list[float] = []
    async for _ in engine.generate(Request(name, None, tuple(engine.tokenize(prompt)), sampling)):
        at.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(at)]


async def run_round(engine: ServingEngine, options: Any, grammar: Grammar | None) -> list[float]:
    """Return the gaps of all free requests beside others, which follow the grammar."""
    free = Sampling(temperature=1, seed=1, max_tokens=options.tokens, ignore_eos=True)
    beside = free.model_copy(update={"grammar": grammar, "max_tokens": 2 * options.tokens})
    prompt = "Question {}: what should I do about a lost card at my bank?\nAnswer:"
    others = [
        asyncio.create_task(time_gaps(engine, f"beside-{i}", prompt.format(100 + i), beside))
        for i in range(options.beside)
    ]
    gaps = await asyncio.gather(*(time_gaps(engine, f"free-{i}", prompt.format(i), free) for i in range(options.free)))
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return [gap for each in gaps for gap in each[2:]]  # after the prompts


def summarise(rounds: list[list[float]]) -> dict[str, float]:
    return {
        "p50_ms": round(1e3 * statistics.median(statistics.median(gaps) for gaps in rounds), 3),
        "p99_ms": round(1e3 * statistics.median(statistics.quantiles(gaps, n=100)[98] for gaps in rounds), 3),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--tokens", type=int, default=48, help="tokens of each free request")
    arguments.add_argument("--free", type=int, default=8, help="free requests that are timed")
    arguments.add_argument("--beside", type=int, default=8, help="requests beside them")
    arguments.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = arguments.parse_args()
    sides: dict[str, Grammar | None] = {"free": None, "constrained": Grammar(kind="json", text=SCHEMA)}
    found: dict[str, list[list[float]]] = {name: [] for name in sides}

    async def measure() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            config = EngineConfig(max_num_seqs=options.free + options.beside, prefix_cache_tokens=0)
            engine = ServingEngine(load_base(ModelConfig(), NoQuantization(), device=DEVICE), Registry(scratch), config)
            await engine.start()
            for index in range(options.rounds + 1):  # the first round warms up
                for name, grammar in list(sides.items())[:: 1 if index % 2 else -1]:  # in turns, which is first
                    gaps = await run_round(engine, options, grammar)
                    if index:
                        found[name].append(gaps)
            await engine.close()

    asyncio.run(measure())
    pairs = zip(found["constrained"], found["free"], strict=True)
    ratio = statistics.median(statistics.median(held) / statistics.median(free) for held, free in pairs)
    figures = {
        "date": today(), "machine": machine(), "threads": torch.get_num_threads(),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "beside": {name: summarise(rounds) for name, rounds in found.items()},
        "p50_beside_constrained_over_free": round(ratio, 3),
    }  # fmt: skip
    print(json.dumps(figures, indent=2))
    if options.out:
        write_json(options.out, figures)


if __name__ == "__main__":
    main()
