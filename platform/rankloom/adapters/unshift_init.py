"""Writes a PiSSA or OLoRA adapter, whose initialisation moves a part of W into it, for the *unchanged* W.

W + s·B·A of the changed base is W₀ + s·(B·A - B₀·A₀), a LoRA of twice the rank (PiSSA, arXiv 2404.02948, appendix).
PEFT converts too, but loads the initial adapter from disk for it; here it is in memory.
"""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file

from rankloom.registry.checks import PREFIX, WEIGHTS


def save_without_base_change(model: peft.PeftModel, initial: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a plain LoRA folder with twice each layer's rank.

    A layer narrower than the rank has factors as narrow as itself, but is still scaled by alpha over the rank.

    Args:
        initial: name of the parameter in `model` -> A₀ [r, in] or B₀ [out, r] right after attaching.
    """
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    file = folder / WEIGHTS
    # PEFT leaves the adapter's name out of the saved keys
    before = {name.replace(".default.", "."): value for name, value in initial.items()}
    doubled, ranks = {}, {}
    for name, after in load_file(file).items():
        moved = before[name].to(after.dtype)
        if "lora_A" in name:
            doubled[name] = torch.cat([after, moved], dim=0)
            ranks[name.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = len(doubled[name])
        else:
            doubled[name] = torch.cat([after, -moved], dim=1)
    save_file(doubled, file, metadata={"format": "pt"})
    config = model.peft_config["default"]
    scaling = config.lora_alpha / config.r
    plain = peft.LoraConfig.from_pretrained(folder)
    plain.r = max(ranks.values())
    plain.lora_alpha = plain.r * scaling
    plain.rank_pattern = {name: rank for name, rank in ranks.items() if rank != plain.r}
    plain.alpha_pattern = {name: rank * scaling for name, rank in plain.rank_pattern.items()}
    plain.init_lora_weights = plain.inference_mode = True
    plain.save_pretrained(folder)
