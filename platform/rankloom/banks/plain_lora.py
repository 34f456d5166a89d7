"""An adapter as plain LoRA, for engines that know nothing else: one rank, a scaling of 1, on linear layers alone.

rsLoRA, and ranks and alphas of a layer's own, which AdaLoRA leaves, go into the factors, exactly: scalings into B, and
lower ranks are filled up with zeros.
"""

from __future__ import annotations

from pathlib import Path

import peft
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from rankloom.adapters.weights import read_adapter
from rankloom.banks.served_adapter import ServedAdapter
from rankloom.errors import RegistryError
from rankloom.registry.checks import PREFIX, WEIGHTS


def list_more_than_lora(model: PreTrainedModel, folder: Path) -> list[str]:
    """Return, in words, what a PEFT folder has beside LoRA on linear layers; []: `fold` and `write_plain` are exact.

    Raises:
        RegistryError: what in the folder is missing, corrupt, not allowed or does not fit.
    """
    config, tensors = read_adapter(model, folder)
    found = {
        "DoRA magnitudes": config.use_dora,
        "biases": config.lora_bias,
        "a LoRA on embeddings": any(".lora_embedding_" in name for name in tensors),
        "a LoRA on experts": bool(config.target_parameters),
        f"whole modules ({', '.join(config.modules_to_save or ())})": config.modules_to_save,
    }
    return [what for what, has in found.items() if has]


def write_plain(adapter: ServedAdapter, folder: Path) -> None:
    """Write the LoRA on an adapter's linear layers as a PEFT folder with one rank and no scaling.

    Raises:
        RegistryError: it can't be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.linears.items():
        less = adapter.rank - factors.rank
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pad(factors.a_RI, (0, 0, 0, less))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pad(factors.b_RO.T, (0, less)).contiguous()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=adapter.rank,
        lora_alpha=adapter.rank,
        target_modules=sorted(adapter.linears),
    )
    try:
        folder.mkdir(parents=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise RegistryError(f"{folder}: can't be written: {error}") from None
