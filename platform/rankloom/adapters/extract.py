"""Writes any method's result as an adapter folder that PEFT loads.

AdaLoRA becomes LoRA with a rank for each layer, exactly. If the base's own weights changed (full, GaLore, LISA), a
truncated SVD reduces the difference of each matrix to a rank; parameters without a low rank (norms, biases) are kept
whole, so that only the rank is lost. Every scaling is 1: alpha equals rank in each layer and as a whole.
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
from rankloom.models import find_idle_linears, is_linear, reload_weights
from rankloom.registry.checks import PREFIX, WEIGHTS

FULL_SVD_UP_TO = {"cpu": 4096, "cuda": 512}
"""Smaller dimension up to which all singular vectors are computed, which takes a GPU seconds for a matrix of
thousands; above, only the wanted ones are computed, by sampling."""


@dataclass
class _Parts:
    """The parts of the adapter to write. As in PEFT, B·A (out x in) is added to a module's weight."""

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Module -> A [r, in], B [out, r]; for an embedding, in is the vocabulary."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    """Modules kept with all their weights."""


def convert_adalora(model: peft.PeftModel, folder: Path) -> None:
    """Write an AdaLoRA model as plain LoRA, exact: P·E·Q becomes B·A with E folded into B, without the zero E.

    Raises:
        TrialError: every layer has rank 0.
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


def find_unsupported_parameters(model: PreTrainedModel) -> list[str]:
    """Return the names of the parameters that no adapter can hold.

    An adapter holds products for layers, and whole modules. A module with layers below it (Mamba's A_log), kept whole,
    would hold its layers a second time. A module that gets its state from outside (RecurrentGemma's rg_lru) would get
    none in PEFT's copy.
    """
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if hasattr(module, "recurrent_states") or any(True for child in module.children() for _ in child.parameters())
        for parameter, _ in module.named_parameters(recurse=False)
    ]


@torch.no_grad()
def extract_adapter(model: PreTrainedModel, base_folder: Path, rank: int, folder: Path, base_id: str) -> float:
    """Write the change of the weights as an adapter of (at most) a rank, by comparison with the base, loaded again.

    A tied head gets the embedding's difference a second time, because PEFT wraps the two separately. PEFT does not
    support biases beside LoRA on an embedding: if linear biases changed, embeddings are kept whole. Layers whose weight
    the model reads without calling them are kept whole too.

    Args:
        model: the trained model.
        base_folder: the untrained base's model folder.
        rank: rank of the extracted products.
        folder: where to write the adapter.
        base_id: the base's id, for the adapter's config.

    Returns:
        The share of the difference's energy (squared Frobenius norm) that the adapter keeps, 0 to 1.

    Raises:
        TrialError: training changed nothing, made a weight non-finite, or changed a parameter that no adapter can hold.
        ModelError: the base can't be loaded, or is another model.
    """
    modules = dict(model.named_modules())
    # from a loaded model, because the files may name or group weights differently
    stored = dict(reload_weights(base_folder, model.dtype).named_parameters(remove_duplicate=False))
    alone = find_idle_linears(model)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # tied weights have several names
        names.setdefault(parameter, []).append(name)
    parts = _Parts()
    total = kept = 0.0
    # biases first: a changed bias decides how embeddings are kept
    for parameter, aliases in sorted(names.items(), key=lambda item: not item[1][0].endswith(".bias")):
        if aliases[0] not in stored or stored[aliases[0]].shape != parameter.shape:
            raise ModelError(f"{base_folder} holds another model: {aliases[0]} is missing there, or has another shape")
        before = stored[aliases[0]].to(parameter.device, parameter.dtype)
        if torch.equal(before, parameter):
            continue
        delta = parameter.float() - before.float()
        if not delta.isfinite().all():
            raise TrialError(f"{aliases[0]} holds values that are not finite: training diverged")
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
        if name not in parts.factors:  # its weight is unchanged: a zero product carries the bias
            width, height = _read_widths(modules[name])
            parts.factors[name] = (bias.new_zeros(1, width), bias.new_zeros(height, 1))
    if not parts.factors:
        raise TrialError(
            f"only {', '.join(sorted(parts.whole))} changed; an adapter needs a linear layer or an embedding"
        )
    _write(model, parts, folder, base_id)
    return min(1.0, kept / total)  # rounding can give a little more


def _takes_factors(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, nn.Embedding)


def _read_widths(linear: nn.Module) -> tuple[int, int]:
    first, second = linear.weight.shape  # type: ignore[misc]
    return (int(first), int(second)) if isinstance(linear, Conv1D) else (int(second), int(first))


def _truncate(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the L [m, r] and R [r, n], of similar norm, whose product is nearest to delta, and the energy of L·R."""
    r = min(rank, *delta.shape)
    if min(delta.shape) <= FULL_SVD_UP_TO[delta.device.type]:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[delta.device] if delta.is_cuda else []):
            torch.manual_seed(0)  # makes the sampling, and so the export, reproducible
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
    if held := [name for name in find_unsupported_parameters(model) if name.rpartition(".")[0] in parts.whole]:
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
        # cloned, because safetensors refuses the views that a tied head's factors are
        cloned = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        save_file(cloned, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise TrialError(
            f"{folder}: the adapter can't be written: {error}; make room there or choose another place"
        ) from None
