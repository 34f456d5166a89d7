"""Writes model folders like the quantised checkpoints on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def write_fp8(folder: Path) -> Path:
    """Quantise a folder's projections as in DeepSeek-V3: FP8 codes, and a scale for each block of 128."""
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.abs().max().float() / 448
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.repeat(*(-(-n // 128) for n in weight.shape)).contiguous()
    return _write(folder, tensors, FP8)


def write_mxfp4(folder: Path) -> Path:
    """Quantise a gpt-oss's experts as in the published models: random MXFP4 codes, and a scale for every 32."""
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            num_experts, num_in, num_out = weight.shape
            blocks = (num_experts, num_out, num_in // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = torch.full(blocks, 123, dtype=torch.uint8)
        else:
            tensors[name] = weight
    return _write(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def _write(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
