"""Any method's result as an adapter folder that PEFT loads.

AdaLoRA becomes LoRA with a rank for each layer, exactly. Where the base's own weights changed (full, GaLore, LISA),
the difference of each matrix is cut to a rank by a truncated SVD; what has no low rank (norms, biases) is kept whole,
so that the rank is all that is lost. Every scaling is 1: alpha and rank agree in each layer and as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankloom.errors import ModelError, TrialError
from rankloom.models import bypassed, is_linear, reload_weights
from rankloom.registry.checks import PREFIX, WEIGHTS

FULL_SVD_UP_TO = {"cpu": 4096, "cuda": 512}
"""The smaller dimension up to which all singular vectors are computed, which takes a GPU seconds for a matrix of
thousands; beyond, only the wanted ones, by sampling."""


@dataclass
class _Parts:
    """What will be written. B·A (out x in) is what is added to a module's weight, as in PEFT."""

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Module -> A [r, in], B [out, r]; for an embedding in is the vocabulary."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    """Modules kept with all their weights."""


def adalora_to_lora(model: peft.PeftModel, folder: Path) -> None:
    """Write an AdaLoRA model as plain LoRA, exact: P·E·Q becomes B·A with E folded into B, without the zero E.

    Raises:
        TrialError: no layer has any rank left.
    """
    config = model.peft_config["default"]
    parts = _Parts()
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, AdaLoraLayer):
            continue
        a, b = module.lora_A["default"].detach().float(), module.lora_B["default"].detach().float()
        e = module.lora_E["default"].detach().float().flatten()
        kept = e != 0
        if kept.any():
            # PEFT's AdaLoRA divides by the layer's rank at the start, and guards that with 1e-5
            scale = module.scaling["default"] / (module.ranknum["default"] + 1e-5)
            parts.factors[name] = (a[kept], b[:, kept] * e[kept] * scale)
    if not parts.factors:
        raise TrialError("AdaLoRA left every layer at rank 0; train longer or raise method.target_rank")
    _write(model.get_base_model(), parts, folder, config.base_model_name_or_path)


def cannot_be_carried(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that no adapter can hold: those of a module with layers below it (Mamba's A_log).

    An adapter has products for layers, and whole modules; such a module whole would hold its layers a second time. Nor
    can it hold a module that is written a state from outside (RecurrentGemma's rg_lru): PEFT's copy would not get it.
    """
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if hasattr(module, "recurrent_states") or any(True for child in module.children() for _ in child.parameters())
        for parameter, _ in module.named_parameters(recurse=False)
    ]


@torch.no_grad()
def extract_adapter(model: PreTrainedModel, base_folder: Path, rank: int, folder: Path, base_id: str) -> float:
    """Write what training changed as an adapter of (at most) a rank; the base is loaded again, to compare with.

    A tied head gets the embedding's difference a second time, because PEFT wraps the two apart. PEFT can't have
    biases beside LoRA on an embedding: where linear biases changed, embeddings are kept whole. So are layers whose
    weight the model takes without calling them.

    Returns:
        The share of the difference's energy (squared Frobenius norm) that the adapter keeps.

    Raises:
        TrialError: training changed nothing, to something that isn't finite, or what no adapter can hold.
        ModelError: the base can't be loaded, or is another model.
    """
    modules = dict(model.named_modules())
    # not read off the files: they may name or group weights otherwise than the model does
    stored = dict(reload_weights(base_folder, model.dtype).named_parameters(remove_duplicate=False))
    alone = bypassed(model)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # tied weights have several names
        names.setdefault(parameter, []).append(name)
    parts = _Parts()
    total = kept = 0.0
    # biases first: whether any changed decides how embeddings are kept
    for parameter, aliases in sorted(names.items(), key=lambda item: not item[1][0].endswith(".bias")):
        if aliases[0] not in stored or stored[aliases[0]].shape != parameter.shape:
            raise ModelError(f"{base_folder} holds another model: {aliases[0]} is not in it, or of another shape")
        before = stored[aliases[0]].to(parameter.device, parameter.dtype)
        if torch.equal(before, parameter):
            continue
        delta = parameter.float() - before.float()
        if not delta.isfinite().all():
            raise TrialError(f"{aliases[0]} holds values that are no finite numbers: training diverged")
        energy = float(delta.double().square().sum())
        total += energy
        owners = [alias.rpartition(".")[0] for alias in aliases]
        attribute = aliases[0].rpartition(".")[2]
        if attribute == "bias" and is_linear(modules[owners[0]]) and owners[0] not in alone:
            parts.biases[owners[0]] = delta
        elif attribute == "weight" and all(_takes_factors(modules[o]) and o not in alone for o in owners):
            whole = [owner for owner in owners if parts.biases and isinstance(modules[owner], nn.Embedding)]
            parts.whole.update(whole)
            if whole != owners:
                left, right, energy = _truncate(delta, rank)
            for owner in set(owners) - set(whole):
                transposed = isinstance(modules[owner], (Conv1D, nn.Embedding))  # both keep [in, out]
                parts.factors[owner] = (left.T, right.T) if transposed else (right, left)
        else:
            parts.whole.update(owners)
        kept += energy
    if not total:
        raise TrialError(
            "training changed no weight: there is nothing to extract; raise the learning rate or the budget"
        )
    for name, bias in parts.biases.items():
        if name not in parts.factors:  # its weight is as it was: a product that is zero carries the bias
            width, height = _in_out(modules[name])
            parts.factors[name] = (bias.new_zeros(1, width), bias.new_zeros(height, 1))
    if not parts.factors:
        raise TrialError(
            f"only {', '.join(sorted(parts.whole))} changed; an adapter needs a linear layer or an embedding"
        )
    _write(model, parts, folder, base_id)
    return min(1.0, kept / total)  # rounding can give a little more


def _takes_factors(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, nn.Embedding)


def _in_out(linear: nn.Module) -> tuple[int, int]:
    first, second = linear.weight.shape  # type: ignore[misc]
    return (int(first), int(second)) if isinstance(linear, Conv1D) else (int(second), int(first))


def _truncate(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best L [m, r] and R [r, n] with L·R near delta, of like size, and the energy of L·R."""
    r = min(rank, *delta.shape)
    if min(delta.shape) <= FULL_SVD_UP_TO[delta.device.type]:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[delta.device] if delta.is_cuda else []):
            torch.manual_seed(0)  # the sampling: the same export twice
            u, s, v = torch.svd_lowrank(delta, q=min(r + 32, *delta.shape), niter=4)
            vh = v.T
    root = s[:r].sqrt()
    return u[:, :r] * root, root[:, None] * vh[:r], float(s[:r].double().square().sum())


def _write(model: PreTrainedModel, parts: _Parts, folder: Path, base_id: str | None) -> None:
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in parts.factors.items():
        key = f"{PREFIX}{name}."
        if isinstance(modules[name], nn.Embedding):
            tensors |= {f"{key}lora_embedding_A": a, f"{key}lora_embedding_B": b}
            continue
        tensors |= {f"{key}lora_A.weight": a, f"{key}lora_B.weight": b}
        if parts.biases:  # PEFT has a bias on all layers or on none
            tensors[f"{key}lora_B.bias"] = parts.biases.get(name, b.new_zeros(len(b)))
    if held := [name for name in cannot_be_carried(model) if name.rpartition(".")[0] in parts.whole]:
        raise TrialError(f"{held[0]} changed, but its module also holds other layers and can't be kept whole")
    for name in parts.whole:
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in modules[name].state_dict().items()}
    ranks = {name: len(a) for name, (a, _) in parts.factors.items()}
    largest = max(ranks.values())
    smaller = {name: rank for name, rank in ranks.items() if rank != largest}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_id,
        inference_mode=True,
        r=largest,
        lora_alpha=largest,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        target_modules=sorted(ranks),
        modules_to_save=sorted(parts.whole) or None,
        lora_bias=bool(parts.biases),
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in ranks),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # cloned, because a tied head's factors are views of the embedding's, which safetensors refuses
        cloned = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        save_file(cloned, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise TrialError(
            f"{folder}: the adapter can't be written: {error}; make room there or choose another place"
        ) from None
