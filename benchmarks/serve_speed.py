"""Served tokens/s with many adapters in one batch, side by side in one process: rankloom's engine and PEFT.

    python benchmarks/serve_speed.py [--rounds 15] [--tokens 24] [--rank 16] [--at 1 8 16]

At each number of concurrent requests, each with its own adapter on all linear layers: the engine without
adapters, the engine with them, PEFT's mixed batch (`adapter_names`) and PEFT switching adapters (`set_adapter`) request
by request. All generate the same number of tokens for the same prompts, greedily, end to end: prompts, sampling and
text included. The sides take turns, round by round, so that other load on the machine affects all of them; the medians
count, and of a shared machine's rounds the more the better. No prefix is reused. OpenMP is set as in a replica.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from common import machine, today, write_json

from rankloom.adapters.probe import record_probe
from rankloom.adapters.weights import load_adapter
from rankloom.config.engine import EngineConfig
from rankloom.config.model import ModelConfig, NoQuantization
from rankloom.deploy.replica import ENVIRONMENT
from rankloom.engine.engine import ServingEngine
from rankloom.engine.protocol import Request, Sampling
from rankloom.models import Base, choose_auto_dtype, load_base
from rankloom.registry import BaseModelRef, Draft, Registry, Versions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SWITCHED = 2
"""Requests to time if they run one after the other: their rate does not depend on their number."""
PEFT_ROUNDS = 3
"""PEFT's sides take several times as long, and differ by far more than rounds do."""
TOPICS = [
    "a lost card",
    "a late transfer",
    "a wrong fee",
    "a new PIN",
    "a closed account",
    "a refund",
    "a loan",
    "cash",
]


def publish(base: Base, root: Path, work: Path, num: int, rank: int) -> list[str]:
    """Publish random adapters, strong enough to change what is generated."""
    registry, refs = Registry(root), []
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules="all-linear")
    model = peft.get_peft_model(base.model, config)
    for i in range(num):
        torch.manual_seed(i)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(work / f"a{i}")
        (work / f"a{i}" / "README.md").unlink(missing_ok=True)
    model.unload()
    draft = Draft(
        method="lora",
        base=BaseModelRef(id=base.id, fingerprint=base.fingerprint, quantization="none"),
        servable="itself",
        trial={"name": "speed"},
        data_fingerprint=None,
        scorecard=None,
        versions=Versions(rankloom="0", torch="0", transformers="0", peft="0"),
    )
    for i in range(num):
        adapted = load_adapter(base.model, work / f"a{i}")
        record_probe(adapted, base.tokenizer("A probe of a few words.").input_ids, work / f"a{i}")
        adapted.unload()
        refs.append(registry.publish(f"a{i}", work / f"a{i}", draft).ref)
    return refs


class Engine:
    """rankloom's engine: concurrent requests, each with its own adapter or none."""

    def __init__(self, base: Base, root: Path, refs: Sequence[str], num_rows: int, *, pack: bool) -> None:
        self.refs, self.loop = refs, asyncio.new_event_loop()
        config = EngineConfig(max_num_seqs=num_rows, prefix_cache_tokens=0, pack_weights=pack)
        self.engine = ServingEngine(base, Registry(root), config)
        self.loop.run_until_complete(self.engine.start())
        for ref in refs:
            self.loop.run_until_complete(self.engine.pin(ref))

    def run(self, prompts: Sequence[str], num_tokens: int, *, adapted: bool) -> int:
        """Return the generated tokens."""
        sampling = Sampling(temperature=0, max_tokens=num_tokens, ignore_eos=True)

        async def one(i: int) -> int:
            prompt = tuple(self.engine.tokenize(prompts[i]))
            request = Request(str(i), self.refs[i] if adapted else None, prompt, sampling)
            return sum([len(delta.tokens) async for delta in self.engine.generate(request)])

        async def all_of_them() -> int:
            return sum(await asyncio.gather(*(one(i) for i in range(len(prompts)))))

        return self.loop.run_until_complete(all_of_them())

    def close(self) -> None:
        self.loop.run_until_complete(self.engine.close())


class Peft:
    """PEFT with transformers' `generate`, on a model as transformers loads it."""

    def __init__(self, folder: Path, folders: Sequence[Path]) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=choose_auto_dtype(DEVICE)).to(DEVICE)
        self.model = peft.PeftModel.from_pretrained(plain, folders[0], adapter_name="0")
        for i, folder in enumerate(folders[1:], start=1):
            self.model.load_adapter(folder, adapter_name=str(i))
        self.model.eval()

    def mixed(self, prompts: Sequence[str], num_tokens: int) -> int:
        return self._generate(prompts, num_tokens, adapter_names=[str(i) for i in range(len(prompts))])

    def switching(self, prompts: Sequence[str], num_tokens: int) -> int:
        done = 0
        for i, prompt in enumerate(prompts[:SWITCHED]):
            self.model.set_adapter(str(i))
            done += self._generate([prompt], num_tokens)
        return done

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[str], num_tokens: int, **settings: Any) -> int:
        batch = self.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(DEVICE)
        found = self.model.generate(
            **batch, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, **settings
        )
        new = found[:, batch.input_ids.shape[1] :]
        self.tokenizer.batch_decode(new)
        return new.numel()


def timed(work: Callable[[], int]) -> tuple[float, float]:
    """Return tokens per second of wall clock, and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    num_tokens = work()
    return num_tokens / (time.perf_counter() - wall), num_tokens / (time.process_time() - cpu)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--tokens", type=int, default=24, help="tokens to generate per request")
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--at", type=int, nargs="+", default=[1, 8, 16], help="concurrent requests")
    arguments.add_argument("--without-peft", action="store_true", help="run only the engine's two sides")
    arguments.add_argument("--unpacked", action="store_true", help="run without `pack_weights`")
    arguments.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = arguments.parse_args()
    if missing := {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}:
        # torch has read it when it was imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | missing)
    transformers.logging.set_verbosity_error()
    most = max(options.at)
    prompts = [f"Question {i}: what should I do about {TOPICS[i % 8]} at my bank?\nAnswer:" for i in range(most)]

    def load() -> Base:
        return load_base(ModelConfig(), NoQuantization(), device=DEVICE)

    rates: dict[int, dict[str, list[tuple[float, float]]]] = {at: {} for at in options.at}
    with tempfile.TemporaryDirectory() as scratch:
        root, work = Path(scratch) / "registry", Path(scratch) / "work"
        refs = publish(load(), root, work, most, options.rank)
        engine = Engine(load(), root, refs, most, pack=not options.unpacked)
        theirs = None if options.without_peft else Peft(load().folder, [work / f"a{i}" for i in range(most)])
        for index in range(options.rounds + 1):
            for at in options.at:
                some, tokens = prompts[:at], options.tokens if index else 2  # the first round warms up
                sides: dict[str, Callable[[], int]] = {
                    "base": lambda some=some, tokens=tokens: engine.run(some, tokens, adapted=False),
                    "adapters": lambda some=some, tokens=tokens: engine.run(some, tokens, adapted=True),
                }
                if theirs is not None and index <= PEFT_ROUNDS:
                    sides["peft mixed"] = lambda some=some, tokens=tokens: theirs.mixed(some, tokens)
                    sides["peft switching"] = lambda some=some, tokens=tokens: theirs.switching(some, tokens)
                for name, side in sides.items():
                    rate = timed(side)
                    if index:
                        rates[at].setdefault(name, []).append(rate)
        engine.close()
    figures = {
        "date": today(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "tokens_per_s": {at: {name: medians(found) for name, found in sides.items()} for at, sides in rates.items()},
        "adapters_over": {
            at: {
                name: {clock: ratio(sides["adapters"], found, which) for which, clock in enumerate(("wall", "cpu"))}
                for name, found in sides.items()
                if name != "adapters"
            }
            for at, sides in rates.items()
        },
    }
    print(json.dumps(figures, indent=2))
    if options.out:
        write_json(options.out, figures)


def medians(found: Sequence[tuple[float, float]]) -> dict[str, float]:
    wall, cpu = zip(*found, strict=True)
    return {"wall": round(statistics.median(wall), 1), "cpu": round(statistics.median(cpu), 1)}


def ratio(ours: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]], clock: int) -> float:
    """Return the median of the ratios of those rounds that have both."""
    return round(statistics.median(a[clock] / b[clock] for a, b in zip(ours, others, strict=False)), 3)


if __name__ == "__main__":
    main()
