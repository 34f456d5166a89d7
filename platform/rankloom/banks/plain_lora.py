"""An adapter as plain LoRA or DoRA, for engines that know little else: one rank, a scaling of 1, linear layers alone.

rsLoRA, and ranks and alphas of a layer's own, which AdaLoRA leaves, go into the factors, exactly: scalings into B, and
lower ranks are filled up with zeros. DoRA's magnitudes stay as they are.
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


def list_more_than_lora(model: PreTrainedModel, folder: Path, *, allow_dora: bool = False) -> list[str]:
    """Return, in words, what a PEFT folder has beside LoRA on linear layers; []: `fold` and `write_plain` are exact.

    Args:
        allow_dora: leave DoRA's magnitudes out.

    Raises:
        RegistryError: what in the folder is missing, corrupt, not allowed or does not fit.
    """
    config, tensors = read_adapter(model, folder)
    found = {
        "DoRA magnitudes": config.use_dora and not allow_dora,
        "biases": config.lora_bias,
        "a LoRA on embeddings": any(".lora_embedding_" in name for name in tensors),
        "a LoRA on experts": bool(config.target_parameters),
        f"whole modules ({', '.join(config.modules_to_save or ())})": config.modules_to_save,
    }
    return [what for what, has in found.items() if has]


def write_plain(adapter: ServedAdapter, folder: Path) -> None:
    """Write the LoRA on an adapter's linear layers as a PEFT folder with one rank and no scaling.

    Args:
        adapter: of DoRA, one with its magnitudes (`fold(keep_magnitudes=True)`).

    Raises:
        RegistryError: it can't be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.linears.items():
        less = adapter.rank - factors.rank
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pad(factors.a_RI, (0, 0, 0, less))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pad(factors.b_RO.T, (0, less)).contiguous()
        if factors.factor_O is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = factors.factor_O
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        use_dora=any(factors.factor_O is not None for factors in adapter.linears.values()),
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
