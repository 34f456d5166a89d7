"""Finds the parts of a base that adapters can adapt: linear layers, blocks and experts that text passes through."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankloom.config.method import AdapterConfig, Targets
from rankloom.errors import ConfigError, ModelError

FUSED_BY_KERNELS = dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("out_proj",))
"""Model type -> linear layers whose weights its GPU kernels read directly, so that PEFT refuses adapters on them."""


def find_decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the model's stack of equal blocks: its longest ModuleList.

    Raises:
        ModelError: there is no ModuleList.
    """
    stacks = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no ModuleList, so no stack of layers to work on")
    return max(stacks, key=len)


def is_linear(module: nn.Module) -> bool:
    """Return whether adapters can adapt a module: nn.Linear, bitsandbytes' subclasses of it, GPT-2's Conv1D.

    Llama 4's router is an nn.Linear, but returns more than its product.
    """
    return isinstance(module, (nn.Linear, Conv1D)) and "Router" not in type(module).__name__


def get_linear_widths(linear: nn.Module) -> tuple[int, int]:
    """Return a linear layer's (inputs, outputs), quantised or not."""
    if isinstance(linear, Conv1D):
        num_in, num_out = linear.weight.shape
        return num_in, num_out
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def find_target_linears(model: PreTrainedModel, targets: Targets) -> list[str]:
    """Return the full names of the linear layers that `targets` selects, without the head.

    Layers that text does not pass through, such as a vision tower's, are excluded: an adapter there would never train.

    Args:
        targets: `all-linear`, a list of names (each matched against the end of the full name), or a regular
            expression that a full name matches whole.

    Raises:
        ConfigError: nothing matches, or one of the listed names doesn't.
        ModelError: the model has no linear layers.
    """
    head = model.get_output_embeddings()
    left_out = find_idle_linears(model)
    linears = [name for name, m in model.named_modules() if is_linear(m) and m is not head and name not in left_out]
    if targets == "all-linear":
        return linears
    if not linears:
        raise ModelError(
            f"method.target_modules: {type(model).__name__} has no linear layers that an adapter could adapt; take "
            f"another model, or a method that trains the weights themselves"
        )
    patterns = [targets] if isinstance(targets, str) else targets
    matches = _matches if isinstance(targets, str) else _ends_with
    for pattern in patterns:
        if any(matches(name, pattern) for name in linears):
            continue
        if idle := sorted(name for name in left_out if matches(name, pattern)):
            raise ConfigError(
                f"method.target_modules: {pattern!r} selects {idle[0]}, where an adapter does nothing: no text "
                f"passes through it, or the model reads its weight without calling it; this model can be adapted at "
                f"{list_endings(linears)}"
            )
        if isinstance(targets, str):
            raise ConfigError(
                f"method.target_modules: the pattern {pattern!r} matches none of the model's linear layers; it must "
                f"match a whole name such as {linears[0]!r}"
            )
        raise ConfigError(
            f"method.target_modules: {pattern!r} is not a linear layer of this model; it has {list_endings(linears)}"
        )
    return [name for name in linears if any(matches(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"method.target_modules: {pattern!r} is not a regular expression: {error}") from None


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def list_endings(names: Iterable[str]) -> str:
    """Return the last parts of full names, each once, for messages."""
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))


def find_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a mixture's experts that are not layers: full name -> stack of their matrices, [experts, ., .]."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if "Expert" in type(module).__name__
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def chooses_experts(module: nn.Module) -> bool:
    """Return whether a module is a mixture's router, or experts that get the tokens in order with their expert ids."""
    arguments = signature(type(module).forward).parameters.keys()
    return "Router" in type(module).__name__ or not arguments.isdisjoint(("top_k_index", "router_indices"))


def check_experts(model: PreTrainedModel, method: AdapterConfig) -> list[str]:
    """Return a note if `all-linear` leaves out experts and `method.experts` does not decide it.

    Raises:
        ConfigError: `method.experts` is on, but the model has none.
    """
    experts = find_experts(model)
    if method.experts and not experts:
        raise ConfigError(
            "method.experts: this model has no experts beside its linear layers; leave it out, method.target_modules "
            "selects the layers to adapt"
        )
    if not experts or method.experts is not None or method.target_modules != "all-linear":
        return []
    share = sum(p.numel() for p in experts.values()) / sum(p.numel() for p in model.parameters())
    return [
        f"the experts ({share:.0%} of the weights) are not linear layers and stay unchanged: {list_endings(experts)}; "
        f"method.experts=true adapts them too (lora), false leaves them, without this note"
    ]


def find_idle_linears(model: PreTrainedModel) -> frozenset[str]:
    """Return the full names of the linear layers on which an adapter does nothing, whatever the input.

    A forward with a few tokens shows which layers are called: not a vision tower's, and not those whose weight a model
    reads directly (Mamba's dt_proj). A layer counts as idle only if no layer of equal name in any block is called,
    because a token reaches only a few experts. Layers whose weights Mamba's kernels read are known by name.
    """
    calls = trace_linear_calls(model)
    called = {_strip_numbers(name) for name, is_called in calls.items() if is_called}
    fused = FUSED_BY_KERNELS.get(getattr(model.config, "model_type", ""), ())
    return frozenset(name for name in calls if _strip_numbers(name) not in called or name.rsplit(".", 1)[-1] in fused)


def skips_layers(model: PreTrainedModel) -> bool:
    """Return whether a step can leave layers without a gradient: experts that no token chose, parts without text."""
    return not all(trace_linear_calls(model).values())


def trace_linear_calls(model: PreTrainedModel) -> dict[str, bool]:
    """Return each linear layer's full name -> whether a few tokens pass through it; all True if that can't be tried."""
    calls: dict[str, bool] | None = vars(model).get("_rankloom_linear_calls")
    if calls is None:  # cached: called often, later with adapters around the layers
        calls = vars(model)["_rankloom_linear_calls"] = _try_linears(model)
    return calls


@torch.no_grad()
def _try_linears(model: PreTrainedModel) -> dict[str, bool]:
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda _, __, name=name: called.add(name)) for name, module in linears.items()
    ]
    embedding = model.get_input_embeddings().weight
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        model(input_ids=torch.arange(8, device=embedding.device)[None] % len(embedding), use_cache=False)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
        called.update(linears)  # an outline, or a model that takes other inputs
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return {name: name in called or not called for name in linears}


@torch.no_grad()
def find_shared_inputs(model: PreTrainedModel) -> list[list[str]]:
    """Return the groups of linear layers of one module that get the same input, such as q, k and v.

    A forward with a few tokens shows which; where that can't be tried, there are none.
    """
    calls: list[tuple[str, Tensor]] = []  # holding the inputs keeps their ids apart
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0])))
        for name, module in model.named_modules()
        if is_linear(module)
    ]
    try:
        model(input_ids=torch.arange(2, device=model.get_input_embeddings().weight.device)[None], use_cache=False)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, IndexError):
        return []
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(name for name, _ in calls)
    groups: dict[tuple[str, int], list[str]] = {}
    for name, x in calls:
        if times[name] == 1:
            groups.setdefault((name.rpartition(".")[0], id(x)), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _strip_numbers(name: str) -> str:
    """Return a layer's name without the numbers of its block and expert."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
