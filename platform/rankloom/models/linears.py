"""What adapters can sit on in a base: linear layers, blocks and experts, and which of them text goes through."""

from __future__ import annotations

import re
from collections.abc import Iterable
from inspect import signature

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankloom.config.method import AdapterConfig, Targets
from rankloom.errors import ConfigError, ModelError

FUSED_BY_KERNELS = dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("out_proj",))
"""Model type -> linear layers that its kernels on a GPU take by themselves, so that PEFT refuses adapters on them."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's stack of equal blocks: its longest ModuleList."""
    stacks = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no ModuleList: no stack of layers to work on was found")
    return max(stacks, key=len)


def is_linear(module: nn.Module) -> bool:
    """A linear layer that adapters can sit on: nn.Linear, bitsandbytes' subclasses of it, GPT-2's Conv1D."""
    return isinstance(module, (nn.Linear, Conv1D))


def in_out(linear: nn.Module) -> tuple[int, int]:
    """A linear's widths, whatever it is quantised to."""
    if isinstance(linear, Conv1D):
        num_in, num_out = linear.weight.shape
        return num_in, num_out
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def find_target_linears(model: PreTrainedModel, targets: Targets) -> list[str]:
    """Full names of the linear layers that `targets` means; the head is never one of them.

    Nor are layers that text does not go through, such as a vision tower's: an adapter on them would stay as it began.

    Args:
        targets: `all-linear`, a list of names (each matched against the end of the full name), or a regular
            expression that a full name matches whole.

    Raises:
        ConfigError: nothing matches, or one of the listed names doesn't. ModelError: there is none to match.
    """
    head = model.get_output_embeddings()
    left_out = bypassed(model)
    linears = [name for name, m in model.named_modules() if is_linear(m) and m is not head and name not in left_out]
    if targets == "all-linear":
        return linears
    if not linears:
        raise ModelError(
            f"method.target_modules: {type(model).__name__} has no linear layers that an adapter could sit on; take "
            f"another model, or a method that trains the weights themselves"
        )
    patterns = [targets] if isinstance(targets, str) else targets
    meant = _matches if isinstance(targets, str) else _ends_with
    for pattern in patterns:
        if any(meant(name, pattern) for name in linears):
            continue
        if idle := sorted(name for name in left_out if meant(name, pattern)):
            raise ConfigError(
                f"method.target_modules: {pattern!r} means {idle[0]}, where an adapter does nothing: no text goes "
                f"through it, or the model reads its weight without calling it; this model can be adapted at "
                f"{endings(linears)}"
            )
        if isinstance(targets, str):
            raise ConfigError(
                f"method.target_modules: the pattern {pattern!r} matches none of the model's linear layers; it must "
                f"match a whole name such as {linears[0]!r}"
            )
        raise ConfigError(
            f"method.target_modules: {pattern!r} is no linear layer of this model; it has {endings(linears)}"
        )
    return [name for name in linears if any(meant(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"method.target_modules: {pattern!r} is no regular expression: {error}") from None


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def endings(names: Iterable[str]) -> str:
    """Full names as a reader wants them: each last name once."""
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))


def find_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """A mixture's experts where they are no layers: by full name the stacks of their matrices, [experts, ., .]."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if "Expert" in type(module).__name__
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def chooses_experts(module: nn.Module) -> bool:
    """Whether it is a mixture's router, or experts that see tokens in their order, each beside its experts' numbers."""
    arguments = signature(type(module).forward).parameters.keys()
    return "Router" in type(module).__name__ or not arguments.isdisjoint(("top_k_index", "router_indices"))


def check_experts(model: PreTrainedModel, method: AdapterConfig) -> list[str]:
    """A note where `all-linear` leaves out experts, and nobody said that it should.

    Raises:
        ConfigError: the model has none, though they are to be adapted.
    """
    experts = find_experts(model)
    if method.experts and not experts:
        raise ConfigError(
            "method.experts: this model has no experts beside its linear layers; leave it out, method.target_modules "
            "says which of those are adapted"
        )
    if not experts or method.experts is not None or method.target_modules != "all-linear":
        return []
    share = sum(p.numel() for p in experts.values()) / sum(p.numel() for p in model.parameters())
    return [
        f"the experts ({share:.0%} of the weights) are no linear layers and stay as they are: {endings(experts)}; "
        f"method.experts=true adapts them too (lora), false leaves them, without this note"
    ]


def bypassed(model: PreTrainedModel) -> frozenset[str]:
    """Full names of the linear layers on which an adapter does nothing, whatever the input.

    A few tokens are run through the model once, to see which layers are called: not a vision tower's, nor those whose
    weight the model takes by itself (Mamba's dt_proj). A layer is left out only if its like in no other block is
    called either: of experts, each token reaches a few. What Mamba's kernels take by themselves is told by name.
    """
    calls = linear_calls(model)
    called = {_alike(name) for name, is_called in calls.items() if is_called}
    fused = FUSED_BY_KERNELS.get(getattr(model.config, "model_type", ""), ())
    return frozenset(name for name in calls if _alike(name) not in called or name.rsplit(".", 1)[-1] in fused)


def skips_layers(model: PreTrainedModel) -> bool:
    """Whether a step can leave layers without a gradient: experts that no token chose, parts that text never enters."""
    return not all(linear_calls(model).values())


def linear_calls(model: PreTrainedModel) -> dict[str, bool]:
    """Each linear layer's full name, and whether a few tokens go through it; all do where that can't be tried."""
    found: dict[str, bool] | None = vars(model).get("_rankloom_linear_calls")
    if found is None:  # asked for often, later with adapters around the layers
        found = vars(model)["_rankloom_linear_calls"] = _try_linears(model)
    return found


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


def _alike(name: str) -> str:
    """A layer's name without the numbers of its block and expert."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
