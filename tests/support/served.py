"""Adapters of every kind in a registry, and an engine that serves them, for the tests of serving."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankloom.adapters.extract import convert_adalora, extract_adapter
from rankloom.adapters.probe import record_probe
from rankloom.adapters.weights import load_adapter
from rankloom.config.engine import EngineConfig
from rankloom.config.model import ModelConfig, NoQuantization, Quantization
from rankloom.engine.engine import ServingEngine
from rankloom.engine.protocol import Delta, Request, Sampling
from rankloom.models import Base, load_base
from rankloom.registry import BaseModelRef, Draft, Registry, Versions

T = TypeVar("T")
GREEDY = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
LINEARS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "qwen": ["q_proj", "v_proj", "up_proj"],
    "gpt2": ["c_attn", "c_proj"],
}


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load(folder: Path, quantization: Quantization | None = None) -> Base:
    return load_base(ModelConfig(id=str(folder)), quantization or NoQuantization(), device=torch.device("cpu"))


def write_adapter(base: Path, folder: Path, kind: str, *, architecture: str = "llama", seed: int = 0) -> None:
    """Write a PEFT folder of a kind, strong enough to change what is generated."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "extracted":
        trained = plain(base)
        for parameter in trained.parameters():
            parameter.data.add_(0.03 * torch.randn(parameter.shape, generator=generator))
        extract_adapter(trained, base, 8, folder, "a/base")
        return
    common: dict[str, Any] = dict(task_type="CAUSAL_LM", target_modules=LINEARS[architecture])
    if kind == "adalora":
        config: peft.PeftConfig = peft.AdaLoraConfig(**common, init_r=6, target_r=3, total_step=100, tfinal=10)
    else:
        config = {
            "lora": lambda: peft.LoraConfig(**common, r=4, lora_alpha=8),
            "rank1": lambda: peft.LoraConfig(**common, r=1),
            "wide": lambda: peft.LoraConfig(**common, r=20, lora_alpha=16),
            "rslora": lambda: peft.LoraConfig(**common, r=12, use_rslora=True),
            "dora": lambda: peft.LoraConfig(**common, r=8, use_dora=True),
            "patterns": lambda: peft.LoraConfig(
                **common,
                r=4,
                rank_pattern={common["target_modules"][0]: 7},
                alpha_pattern={common["target_modules"][-1]: 3},
            ),
            "silent": lambda: peft.LoraConfig(**common, r=4),
        }[kind]()
    model = peft.get_peft_model(plain(base), config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
        elif "lora_E" in name:
            parameter.data.normal_(generator=generator)
            parameter.data[::2] = 0
        elif "lora_" in name and kind != "silent":
            parameter.data.normal_(std=0.15, generator=generator)
    if kind == "adalora":
        convert_adalora(model, folder)
    else:
        model.save_pretrained(folder, save_embedding_layers=False)


def publish(
    registry: Path,
    base: Base | Path,
    name: str,
    folder: Path,
    *,
    probe: bool = True,
    quantization: Quantization | None = None,
) -> str:
    """Publish a folder as `rankloom` does, and return its ref."""
    loaded = base if isinstance(base, Base) else load(base, quantization)
    if probe:
        record_probe(load_adapter(loaded.model, folder), [7, 50, 101, 9], folder)
    draft = Draft(
        method="lora",
        base=BaseModelRef(id=loaded.id, fingerprint=loaded.fingerprint, quantization=loaded.quantization),  # type: ignore[arg-type]
        servable="itself",
        trial={"name": name},
        data_fingerprint=None,
        scorecard=None,
        versions=Versions(rankloom="0", torch="0", transformers="0", peft="0"),
    )
    (folder / "README.md").unlink(missing_ok=True)
    return Registry(registry).publish(name, folder, draft).ref


def with_peft(base: Path, adapter: Path | None, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return the greedy continuation of PEFT alone, without a cache or any of our code."""
    model: Any = plain(base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def engine_on(base: Base | Path, registry: Path, **settings: Any) -> ServingEngine:
    loaded = base if isinstance(base, Base) else load(base)
    return ServingEngine(loaded, Registry(registry), EngineConfig(**settings))


def serving(engine: ServingEngine, work: Callable[[], Awaitable[T]], *, limit_s: float = 60) -> T:
    """Run `work` while the engine runs, and return its result."""

    async def run() -> T:
        await engine.start()
        try:
            return await asyncio.wait_for(work(), limit_s)
        finally:
            await engine.close()

    return asyncio.run(run())


async def collect(engine: ServingEngine, request: Request) -> list[Delta]:
    return [delta async for delta in engine.generate(request)]


async def completed(
    engine: ServingEngine, prompt: Sequence[int], adapter: str | None = None, *, id: str = "r", **sampling: Any
) -> tuple[str, list[int], list[Delta]]:
    """Return a completion's text, tokens and deltas; greedy by default."""
    settings = GREEDY.model_copy(update=sampling)
    deltas = await collect(engine, Request(id, adapter, tuple(prompt), settings))
    return "".join(d.text for d in deltas), [t for d in deltas for t in d.tokens], deltas
