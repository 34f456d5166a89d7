"""Generation speed with a KV cache: time of a decode step at batch 1, and tokens per second at batch 8."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from rankloom.data.render import Row
from rankloom.evals.batches import (
    count_positions,
    cut_prompt,
    get_device,
    pad_left,
    supports_cache,
    unwrap,
    use_evaluation_mode,
)

NUM_WARMUP = 4
NUM_STEPS = 32
BATCH_SIZE = 8


@dataclass(frozen=True)
class Latency:
    """Speed of decode steps, without the prompt's prefill."""

    latency_ms: float
    """Median time of one step at batch 1, in milliseconds."""
    generated_tokens_per_s: float
    """Tokens per second at batch 8, from the median step."""


def measure_latency(model: nn.Module, rows: Sequence[Row], *, pad_id: int) -> Latency | None:
    """Time greedy decoding after prompts of about the median length; None if the model keeps no KV cache (Mamba)."""
    alone_ms = decode_ms(model, rows, pad_id=pad_id)
    if alone_ms is None:
        return None
    bare = unwrap(model)
    with use_evaluation_mode(bare):
        together_s = _time_steps(bare, _choose_prompts(bare, rows), pad_id) or []
    return Latency(latency_ms=alone_ms, generated_tokens_per_s=BATCH_SIZE / statistics.median(together_s))


def decode_ms(model: nn.Module, rows: Sequence[Row], *, pad_id: int) -> float | None:
    """Return the median time of one decode step at batch 1, in milliseconds; None if the model keeps no KV cache."""
    bare = unwrap(model)
    with use_evaluation_mode(bare):
        alone_s = _time_steps(bare, _choose_prompts(bare, rows)[BATCH_SIZE // 2 :][:1], pad_id)
    return None if alone_s is None else 1000 * statistics.median(alone_s)


def _choose_prompts(bare: PreTrainedModel, rows: Sequence[Row]) -> list[list[int]]:
    """Return the prompts of `BATCH_SIZE` rows of about the median length, repeated if there are fewer rows."""
    by_length = sorted(rows, key=lambda row: row.prompt_length)
    first = max(0, (len(by_length) - BATCH_SIZE) // 2)
    middle = by_length[first : first + BATCH_SIZE]
    prompts = [cut_prompt(row, bare, NUM_WARMUP + NUM_STEPS + 1) or row.input_ids[:1] for row in middle]
    return [prompts[i % len(prompts)] for i in range(BATCH_SIZE)]


def _time_steps(model: PreTrainedModel, sequences: list[list[int]], pad_id: int) -> list[float] | None:
    """Return the seconds of each decode step after the warm-up, past any end token; None without a KV cache."""
    if not supports_cache(model):
        return None
    device = get_device(model)
    prompts = pad_left(sequences, pad_id, device)
    ids_BT, mask_BT, cache = prompts.input_ids_BT, prompts.attention_mask_BT, None
    times = []
    for _ in range(1 + NUM_WARMUP + NUM_STEPS):  # the first is the prefill
        started = time.perf_counter()
        output = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=count_positions(mask_BT)[:, -ids_BT.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, ids_BT = getattr(output, "past_key_values", None), output.logits[:, -1].argmax(-1, keepdim=True)
        if cache is None:
            return None
        mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], dim=1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return times[1 + NUM_WARMUP :]
