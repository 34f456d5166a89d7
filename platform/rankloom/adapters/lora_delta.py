"""PiSSA and OLoRA begin by moving a part of W into the adapter; this writes the adapter for the *unchanged* W.

W + s·B·A of the changed base is W₀ + s·(B·A - B₀·A₀), a LoRA of twice the rank (PiSSA, arXiv 2404.02948, appendix).
PEFT converts too, but by loading the initial adapter again from disk; here both are at hand.
"""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file


def save_without_base_change(model: peft.PeftModel, initial: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a plain LoRA folder of twice the rank.

    Args:
        initial: A₀ [r, in] and B₀ [out, r] by the parameter's name in `model`, as they were right after attaching.
    """
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    file = folder / "adapter_model.safetensors"
    # PEFT leaves the adapter's name out of the saved keys
    before = {name.replace(".default.", "."): value for name, value in initial.items()}
    doubled = {}
    for name, after in load_file(file).items():
        moved = before[name].to(after.dtype)
        doubled[name] = torch.cat([after, moved], dim=0) if "lora_A" in name else torch.cat([after, -moved], dim=1)
    save_file(doubled, file, metadata={"format": "pt"})
    config = model.peft_config["default"]
    plain = peft.LoraConfig.from_pretrained(folder)
    plain.r, plain.lora_alpha, plain.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    plain.inference_mode = True
    plain.save_pretrained(folder)
