"""Bases of real shapes with random weights, random rows and random adapters: no download, and real speed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from rankloom import kernels
from rankloom.banks.served_adapter import Factors, ServedAdapter
from rankloom.config import TrialConfig, parse
from rankloom.data import Row, TaskData
from rankloom.engine import core
from rankloom.engine.adapter_cache.loading import EngineLoader
from rankloom.models import Base, find_target_linears, get_linear_widths
from rankloom.models.fused import fuse

TINY = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024)
SHAPES: dict[str, dict[str, int]] = {
    "135M": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152,
    ),
    "1B": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    ),
    "8B": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    ),
}  # fmt: skip
"""Of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B."""
PROBED = [7, 50, 101, 9]


def random_model(shape: Mapping[str, int], device: torch.device, dtype: torch.dtype) -> Any:
    """Make a frozen Llama on the device itself, with tied embeddings, as transformers computes it."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # as `load_base` does: plans for each new shape take up to seconds
    config = LlamaConfig(
        **shape, max_position_embeddings=8192, pad_token_id=0, eos_token_id=1, bos_token_id=1, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).eval()


def random_base(shape: Mapping[str, int], device: torch.device, dtype: torch.dtype) -> Base:
    """Make a base that no folder holds, as `load_base` would."""
    model = random_model(shape, device, dtype)
    if kernels.use_on(device):
        fuse(model)
    return Base(
        model=model, tokenizer=_tokenizer(), id="random", folder=Path("/nowhere"),
        fingerprint="0" * 16, quantization="none", device=device,
    )  # fmt: skip


@cache
def _tokenizer() -> Any:
    return make_tokenizer()


class RandomRows(list[Row]):
    """`data.Rows` in memory."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row.input_ids) for row in self])

    def select(self, num_rows: int, seed: int | None = None) -> RandomRows:
        return RandomRows(self[:num_rows])


def random_data(shortest: int, longest: int, *, num_rows: int = 512, predicted: float = 0.4) -> TaskData:
    """Make rows of random tokens and uniform lengths, whose last share carries loss; half of them validate."""
    random = np.random.default_rng(0)
    rows = RandomRows()
    for length in random.integers(shortest, longest + 1, num_rows).tolist():
        prompt = max(1, int(length * (1 - predicted)))
        ids = random.integers(2, 900, length).tolist()
        rows.append(Row(ids, [0.0] * prompt + [1.0] * (length - prompt), prompt, ""))
    empty: Any = None
    some: Any = RandomRows(rows[: num_rows // 2])
    return TaskData(rows, some, some, None, None, "random", empty)  # type: ignore[arg-type]


def random_trial(
    seed: int, *, method: str = "lora", rank: int = 16, batch_size: int = 1, **changed: Any
) -> TrialConfig:
    """Return a trial on a random base; unless `budget` is given, it does not end."""
    tree = {
        "name": f"trial-{seed}",
        "seed": seed,
        "model": {"id": "random"},
        "data": {"template": "plain"},
        "method": {"type": method, "rank": rank},
        "optim": {"batch_size": batch_size, "schedule": "constant", "warmup_fraction": 0},
        "budget": {"steps": 1_000_000},
    }
    return parse(TrialConfig, tree | changed)


def adapter_refs(ranks: Sequence[int], num: int, method: str = "lora") -> list[str]:
    """Name random adapters, of these ranks in turn, for `random_adapters_on`."""
    return [f"{method}-{ranks[i % len(ranks)]}-{i}@1" for i in range(num)]


@contextmanager
def random_adapters_on() -> Iterator[None]:
    """Inside the context, new engines make the adapters of `adapter_refs` instead of asking a registry."""
    before = core.EngineLoader
    core.EngineLoader = _RandomLoader  # type: ignore[misc]
    try:
        yield
    finally:
        core.EngineLoader = before  # type: ignore[misc]


class _RandomLoader(EngineLoader):
    def load(self, ref: str) -> ServedAdapter:
        method, rank, _ = ref.split("-")
        adapter = _random_adapter(self._base, int(rank), dora=method == "dora", seed=zlib.crc32(ref.encode()))
        self._logits(adapter, PROBED)
        return adapter


def _random_adapter(base: Base, rank: int, *, dora: bool, seed: int) -> ServedAdapter:
    model, generator = base.model, torch.Generator(base.device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return 0.02 * torch.randn(*size, generator=generator, device=base.device)

    linears = {}
    for name in find_target_linears(model, "all-linear"):
        wide, high = get_linear_widths(model.get_submodule(name))
        a_RI, b_RO = normal(rank, wide).to(model.dtype), normal(rank, high).to(model.dtype)
        linears[name] = Factors(a_RI, b_RO, 1 + normal(high) if dora else None, None)
    return ServedAdapter(linears, {}, {})
