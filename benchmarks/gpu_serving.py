"""The sections of `gpu.py` that serve: the engine on a base alone and with many adapters, and transformers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

import torch
from gpu_baselines import DTYPE
from gpu_bench import Bench
from random_models import adapter_refs, random_adapters_on, random_base, random_model

from rankloom.config.engine import EngineConfig
from rankloom.engine.engine import ServingEngine
from rankloom.engine.protocol import Request, Sampling
from rankloom.models import Base
from rankloom.registry import Registry

SHORT, LONG = 8, 72
"""Generated tokens of two runs, whose difference in time is that of the decode steps between them."""
ROUNDS = 3
PROMPT = 24


class Engine:
    """An engine on a random base, with random adapters in its memory."""

    def __init__(self, base: Base, refs: Sequence[str], num_rows: int) -> None:
        self.loop = asyncio.new_event_loop()
        with random_adapters_on():
            config = EngineConfig(max_num_seqs=num_rows, prefix_cache_tokens=0, max_cpu_loras=max(1, len(refs)))
            self.engine = ServingEngine(base, Registry("/nowhere"), config)
        self.loop.run_until_complete(self.engine.start())
        for ref in refs:
            self.loop.run_until_complete(self.engine.pin(ref))

    def generate(self, refs: Sequence[str | None], num_tokens: int) -> float:
        """Generate so many tokens for a row on each of `refs`; returns the seconds."""
        sampling = Sampling(temperature=0, max_tokens=num_tokens, ignore_eos=True)

        async def one(i: int, ref: str | None) -> None:
            prompt = tuple(2 + (i * 7 + t) % 900 for t in range(PROMPT))
            async for _ in self.engine.generate(Request(str(i), ref, prompt, sampling)):
                pass

        async def all_of_them() -> None:
            await asyncio.gather(*(one(i, ref) for i, ref in enumerate(refs)))

        started = time.perf_counter()
        self.loop.run_until_complete(all_of_them())
        return time.perf_counter() - started

    def decode_ms(self, refs: Sequence[str | None], long: int, rounds: int) -> float:
        """Return the milliseconds of a decode step of these rows."""
        self.generate(refs, SHORT)
        short_s = min(self.generate(refs, SHORT) for _ in range(rounds))
        long_s = min(self.generate(refs, long) for _ in range(rounds))
        return 1e3 * (long_s - short_s) / (long - SHORT)

    def close(self) -> None:
        self.loop.run_until_complete(self.engine.close())
        self.loop.close()


def serve(bench: Bench, name: str, nums: Sequence[int] = (16, 1, 64)) -> None:
    """Measure decode steps on the base, with one adapter, with as many as there are rows, and with DoRA."""
    bench.reset_memory()
    base = random_base(bench.shape(name), bench.device, DTYPE)
    long = SHORT + 4 if bench.dry else LONG
    size = sum(p.numel() * p.element_size() for p in base.model.parameters())
    if floor := bench.find(floor=True):
        bench.tell(serve=name, side="weights read once", step_ms=round(size / floor["bandwidth_gb_per_s"] / 1e6, 3))
    for num in nums:
        if bench.left_s > 0 or num == nums[0]:
            measure_sides(bench, base, name, num, long)
        bench.reset_memory()
    del base
    bench.reset_memory()
    generate_with_transformers(bench, name, bench.members(16), long)


def measure_sides(bench: Bench, base: Base, name: str, num: int, long: int) -> None:
    """Measure the decode steps of so many rows on each kind of adapters."""
    rows = bench.members(num)
    sides: dict[str, list[str | None]] = {"base": [None] * rows, "adapters": [*adapter_refs([16], rows)]}
    if num == 16:
        sides["one adapter"] = [*adapter_refs([16], 1)] * rows
        sides["mixed ranks"] = [*adapter_refs([8, 16, 64], rows)]
        sides["dora"] = [*adapter_refs([16], rows, "dora")]
    engine = Engine(base, sorted({ref for side in sides.values() for ref in side if ref is not None}), rows)
    found: dict[str, float] = {}
    try:
        for side, refs in sides.items():
            if bench.left_s > 0 or side in ("base", "adapters"):
                found[side] = engine.decode_ms(refs, long, 1 if bench.dry else ROUNDS)
                rate = round(1e3 * rows / found[side]) if found[side] > 0 else None
                bench.tell(serve=name, rows=num, side=side, step_ms=round(found[side], 3), tokens_per_s=rate)
        if num == 16:
            bench.reach(f"decode {name}", found["adapters"])
            profiled = partial(engine.generate, sides["adapters"], SHORT)
            bench.reach(f"adapters {name}", 100 * found["base"] / found["adapters"], profiled)
    finally:
        engine.close()


def generate_with_transformers(bench: Bench, name: str, rows: int, num_tokens: int) -> None:
    model = random_model(bench.shape(name), bench.device, DTYPE)
    ids = torch.randint(2, 900, (rows, PROMPT), device=bench.device)
    found = []
    with torch.inference_mode():
        for new in (SHORT, SHORT, num_tokens):
            bench.wait()
            started = time.perf_counter()
            model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            bench.wait()
            found.append(time.perf_counter() - started)
    step_ms = 1e3 * (found[2] - found[1]) / (num_tokens - SHORT)
    bench.tell(serve=name, rows=rows, side="transformers", step_ms=round(step_ms, 3))


def serve_135m(bench: Bench) -> None:
    serve(bench, "135M")


def serve_1b(bench: Bench) -> None:
    serve(bench, "1B")


def serve_8b(bench: Bench) -> None:
    serve(bench, "8B")
