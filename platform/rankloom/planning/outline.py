"""A model without weights, from its config alone, on the meta device: its layers, and its parameters by part."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from rankloom.config.model import ModelConfig, NoQuantization, Quantization
from rankloom.errors import ConfigError
from rankloom.models import find_decoder_layers, find_experts, is_linear, load_shell


def open_outline(config: ModelConfig, quantization: Quantization) -> PreTrainedModel:
    """Return the model on the meta device; of a hub model only its small files are fetched.

    Raises:
        ModelError: the model is missing, or not a causal language model.
    """
    try:
        return load_shell(config, quantization, config_alone=True)
    except ConfigError:  # a checkpoint that is stored quantised; its shape is the same
        return load_shell(config, NoQuantization(), config_alone=True)


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Return the number of parameters by part: embedding, attention, mlp, experts, head, other; each counted once."""
    parts = dict.fromkeys(("embedding", "attention", "mlp", "experts", "head", "other"), 0)
    experts = {id(parameter) for parameter in find_experts(model).values()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    in_layers = {id(module) for layer in find_decoder_layers(model) for module in layer.modules()}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if id(parameter) in experts:
                parts["experts"] += parameter.numel()
            elif module is embedding:
                parts["embedding"] += parameter.numel()
            elif module is head:
                parts["head"] += parameter.numel()
            elif is_linear(module) and id(module) in in_layers:
                parts[_name_linear(name)] += parameter.numel()
            else:
                parts["other"] += parameter.numel()
    return {name: count for name, count in parts.items() if count}


def _name_linear(name: str) -> str:
    if "expert" in name.lower():
        return "experts"
    return "attention" if "attn" in name.lower() or "attention" in name.lower() else "mlp"


def truncate(model: PreTrainedModel, num_layers: int) -> None:
    """Leave a model its first layers only."""
    layers = find_decoder_layers(model)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and list(child) == layers:
                setattr(module, name, nn.ModuleList(layers[:num_layers]))
                return
