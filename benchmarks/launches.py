"""Count a step's operations on a GPU, a layer, without one.

    python benchmarks/launches.py [--layers 16] [--json]

Three steps of a tiny random Llama in bf16, in the ways that a GPU takes (`kernels.everywhere`): a fused training step
of 16 LoRA members, one of 16 DoRA members, and a decoding step of the engine with 16 adapters. Lengths are uneven and
ranks mixed. Every operation that torch dispatches counts, forward, backward, optimiser and sampling alike, except those
that launch nothing: views, and tensors made without a value. An operation of `rankloom.kernels` counts as often as it
launches (`kernels.LAUNCHES`), and one over a list of tensors once for every `CHUNK`. The figures are whole steps over
the number of layers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections import Counter
from typing import Any

import torch
from random_models import TINY, adapter_refs, random_adapters_on, random_base, random_data, random_trial
from torch.utils._python_dispatch import TorchDispatchMode

from rankloom import kernels
from rankloom.config.engine import EngineConfig
from rankloom.engine.core import Core
from rankloom.engine.engine import ServingEngine
from rankloom.engine.protocol import Request, Sampling
from rankloom.registry import Registry
from rankloom.training.fused.host import TrialHost

NUM_MEMBERS = 16
RANKS = (8, 16, 32)
CHUNK = 36
"""Tensors of a list that one launch takes, in torch's AdamW."""
SILENT = {
    "detach_", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_",
    "_unsafe_view",
}  # fmt: skip
"""Operations that launch nothing, beside views."""
WHOLE = {"linear", "rms_norm", "scaled_dot_product_attention"}
"""Operations that torch would take apart, but not on a GPU."""


class LaunchCount(TorchDispatchMode):
    """Counts operations by name inside the context, in the thread that enters it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        if func._can_decompose() and name not in WHOLE and not func.is_view:  # in inference mode; else autograd has
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if not func.is_view and name not in SILENT:
            lists = [len(value) for value in args if isinstance(value, (list, tuple)) and name.startswith("_f")]
            chunks = math.ceil(max(lists, default=1) / CHUNK)
            self.launches[name] += kernels.LAUNCHES.get(name, 1) * max(1, chunks)
        return func(*args, **(kwargs or {}))


def count_train_step(num_layers: int, method: str) -> Counter[str]:
    """Count the third step of a host."""
    base = random_base(TINY | {"num_hidden_layers": num_layers}, torch.device("cpu"), torch.bfloat16)
    data = random_data(5, 12)
    host = TrialHost(
        base, data, num_slots=NUM_MEMBERS, max_rank=max(RANKS), token_budget=2**20, with_magnitudes=method == "dora",
        precision=torch.bfloat16,
    )  # fmt: skip
    for seed in range(NUM_MEMBERS):
        rank = RANKS[seed % len(RANKS)]
        host.admit(f"trial-{seed}", random_trial(seed, method=method, rank=rank, batch_size=1))
    for _ in range(2):
        host.step()
    with LaunchCount() as count:
        host.step()
    assert host.last_plan is not None
    assert len(host.last_plan.shares) == NUM_MEMBERS
    return count.launches


def count_decode_step(num_layers: int, num_adapters: int) -> Counter[str]:
    """Count the last step of an engine in which all sequences decode."""
    base = random_base(TINY | {"num_hidden_layers": num_layers}, torch.device("cpu"), torch.bfloat16)
    steps: list[Counter[str]] = []
    step = Core.step

    def counted(core: Core) -> bool:
        before = core.get_stats().generated_tokens
        with LaunchCount() as count:
            worked = step(core)
        if core.get_stats().generated_tokens - before == num_adapters:
            steps.append(count.launches)
        return worked

    async def generate_all() -> None:
        await engine.start()
        for ref in refs:
            await engine.pin(ref)
        sampling = Sampling(temperature=0, max_tokens=6, ignore_eos=True)

        async def generate(i: int, ref: str) -> None:
            async for _ in engine.generate(Request(ref, ref, tuple(range(5, 8 + i % 5)), sampling)):
                pass

        await asyncio.gather(*(generate(i, ref) for i, ref in enumerate(refs)))
        await engine.close()

    refs = adapter_refs(RANKS, num_adapters)
    Core.step = counted  # type: ignore[method-assign]
    try:
        with random_adapters_on():
            engine = ServingEngine(base, Registry("/nowhere"), EngineConfig(prefix_cache_tokens=0))
            asyncio.run(generate_all())
    finally:
        Core.step = step  # type: ignore[method-assign]
    return steps[-2]  # the last one also ends its sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="print only one line, a JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with kernels.everywhere():
        found = {
            "train_lora": count_train_step(options.layers, "lora"),
            "train_dora": count_train_step(options.layers, "dora"),
            "decode_16_adapters": count_decode_step(options.layers, 16),
        }
    if not options.json:
        for step, launches in found.items():
            print(f"{step}: {launches.total()} operations, the most frequent:")
            print(" ".join(f"{name} {num}" for name, num in launches.most_common(20)))
    print(json.dumps({step: round(launches.total() / options.layers, 1) for step, launches in found.items()}))


if __name__ == "__main__":
    main()
