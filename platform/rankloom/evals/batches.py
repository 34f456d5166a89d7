"""Helpers of all measures: the bare module of a model, evaluation mode, batches of rows, prompts padded on the left.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from rankloom.data.render import Row


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the model inside DDP's wrapper, to evaluate with.

    The wrapper's forward synchronises buffers between workers even without a gradient, so that workers with different
    numbers of evaluation batches would wait for each other.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


def get_device(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter."""
    return next(model.parameters()).device


@contextmanager
def use_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and restore each module's mode afterwards.

    inference_mode can't be used: a buffer made under it, such as a rotary cache that a long row enlarges, may not take
    part in a later backward pass.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def batch_by_length(rows: Sequence[Row], batch_size: int) -> list[list[Row]]:
    """Return all rows in batches, longest first: if memory is too small, the first batch fails."""
    ordered = sorted(rows, key=lambda row: -len(row.input_ids))
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


@dataclass
class PromptBatch:
    """Token ids padded on the left, so that every row's next token is predicted at the last position."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> PromptBatch:
    """Pad sequences of token ids on the left into one batch."""
    width = max(map(len, sequences))
    ids = [[pad_id] * (width - len(s)) + list(s) for s in sequences]
    mask = [[0] * (width - len(s)) + [1] * len(s) for s in sequences]
    return PromptBatch(torch.tensor(ids, device=device), torch.tensor(mask, device=device))


def count_positions(attention_mask_BT: Tensor) -> Tensor:
    """Return position ids [B, T]: each row counts its real tokens from 0."""
    return (attention_mask_BT.cumsum(-1) - 1).clamp(min=0)


def cut_prompt(row: Row, model: PreTrainedModel, room: int) -> list[int]:
    """Return the row's tokens before its completion, cut at the start so that the context holds `room` more tokens."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    prompt = row.input_ids[: row.prompt_length]
    return prompt[-max(1, context - room) :] if context else prompt


@torch.no_grad()
def supports_cache(model: PreTrainedModel) -> bool:
    """Return whether the model can continue from a cache; some models without attention layers can't."""
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=get_device(model)), use_cache=True)
    except ValueError:
        return False
    return True


def supports_left_padding(model: PreTrainedModel) -> bool:
    """Return whether rows may be padded on the left; not if learned positions count from the first token (BART)."""
    learned = any(name.endswith("embed_positions") for name, _ in model.named_modules())
    return not learned or "position_ids" in inspect.signature(type(model).forward).parameters
