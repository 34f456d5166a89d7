"""Merges an adapter and its base into one model folder that transformers loads without PEFT.

The sum equals what `load_adapter` computes, weight by weight. An adapter on an NF4 or int8 base is merged into the
*dequantised* base, because it was tuned on that: the merged model is then not the original base plus the adapter, and
takes the space of the unquantised base.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from rankloom.adapters.probe import load_recorded_base
from rankloom.adapters.weights import load_adapter
from rankloom.errors import RegistryError
from rankloom.models import Base
from rankloom.models.checkpoints import cast_weights, forget_quantization
from rankloom.registry.record import Record

NEARLY = 1e-6
"""Embedding and head are tied again if no weight differs by more than this share of the largest."""


def merge_adapter(folder: Path, record: Record, destination: Path) -> None:
    """Write base + adapter as safetensors with the tokenizer; computed in fp32, stored in the base's own type.

    Args:
        folder: the adapter's folder.
        destination: the new model's folder, which must not exist.

    Raises:
        RegistryError: the destination exists or can't be written, the base differs, or the adapter is refused.
    """
    destination = destination.expanduser()
    if destination.exists():
        raise RegistryError(f"{destination}: exists already; remove it or choose another place")
    base = load_recorded_base(record, torch.float32)
    plain = _dequantise(base)
    adapter = load_adapter(plain, folder)
    merged = _merge(adapter, folder)
    cast_weights(merged, AutoConfig.from_pretrained(base.folder).dtype or torch.float32)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=destination.parent, prefix=".staged-"))
    except OSError as error:
        raise RegistryError(f"{destination}: can't be written: {error}") from None
    try:
        merged.save_pretrained(staged)
        base.tokenizer.save_pretrained(staged)
        staged.chmod(0o755)
        staged.rename(destination)
    except (OSError, SafetensorError) as error:
        raise RegistryError(f"{destination}: can't be written: {error}; nothing is left behind") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _dequantise(base: Base) -> PreTrainedModel:
    model = base.model
    if base.quantization != "none":
        model = model.dequantize()
        forget_quantization(model)
    plain: PreTrainedModel = model.to(torch.float32)
    return plain


def _merge(adapter: PeftModel, folder: Path) -> PreTrainedModel:
    base = adapter.get_base_model()
    embedding, head = _unwrap(base.get_input_embeddings()), _unwrap(base.get_output_embeddings())
    tied = head is not None and head.weight is embedding.weight
    if tied:  # untie, otherwise the update of one would be added to both, twice
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and module.lora_bias.get("default"):
            _drop_zero_bias(name, module, folder)
    try:
        merged: PreTrainedModel = adapter.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        raise RegistryError(f"{folder}: can't be merged: {error}") from None
    if tied:
        embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
        difference = (embedding.weight - head.weight).abs().max()
        tied = bool(difference <= NEARLY * embedding.weight.abs().max())
        if tied:
            head.weight = embedding.weight
        merged.config.tie_word_embeddings = tied
    return merged


def _unwrap(module: Any) -> Any:
    """Return the base's own module inside PEFT's wrappers."""
    for wrapped in ("base_layer", "original_module"):
        if hasattr(module, wrapped):
            return _unwrap(getattr(module, wrapped))
    return module


def _drop_zero_bias(name: str, layer: LoraLayer, folder: Path) -> None:
    """Drop a zero LoRA bias, which PEFT refuses to merge into a layer without a bias."""
    if layer.get_base_layer().bias is not None:
        return
    if layer.lora_B["default"].bias.any():
        raise RegistryError(f"{folder}: {name} has a LoRA bias but the base's layer has none to merge it into")
    layer.lora_bias["default"] = False
