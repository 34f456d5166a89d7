"""The base model and its quantisation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rankloom.config.base import Frozen
from rankloom.config.paths import IsPath

Dtype = Literal["auto", "fp32", "bf16", "fp16"]


class ModelConfig(Frozen):
    """A base model that `transformers.AutoModelForCausalLM` can load."""

    id: Annotated[str, IsPath(or_id=True)] = "builtin:smollm2"
    """A hub id, a local folder, a `.gguf` file, or `builtin:smollm2` (SmolLM2-135M-Instruct from the demo extra)."""
    revision: str | None = None
    """A hub branch, tag or commit; only for hub ids."""
    dtype: Dtype = "auto"
    """Type of the weights in memory. auto: fp32 on a CPU or when all weights train, else bf16."""


def _expand_id(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


AnyModel = Annotated[ModelConfig, BeforeValidator(_expand_id, json_schema_input_type=str | ModelConfig)]
"""A model's id, or a mapping with it as `id`."""


class NoQuantization(Frozen):
    """The weights as they are stored."""

    type: Literal["none"] = "none"


class Int8(Frozen):
    """Weights in 8 bits with a scale for each row, by bitsandbytes (LLM.int8(), arXiv 2208.07339); also for checkpoints
    stored in it. Activations keep their type."""

    type: Literal["int8"] = "int8"


class Nf4(Frozen):
    """4-bit NormalFloat through bitsandbytes (QLoRA, arXiv 2305.14314); also for checkpoints stored in it."""

    type: Literal["nf4"] = "nf4"
    double: bool = True
    """Also quantise the quantisation constants: 0.4 bits per weight less. A checkpoint in NF4 keeps its own."""
    compute_dtype: Dtype = "auto"
    """Type to dequantise weights to for arithmetic. auto: the precision of the run."""


def _spell_out(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


Quantization = Annotated[
    NoQuantization | Int8 | Nf4,
    Field(discriminator="type"),
    BeforeValidator(_spell_out, json_schema_input_type=Literal["none", "int8", "nf4"] | NoQuantization | Int8 | Nf4),
]
"""`none`, `int8`, `nf4`, or a mapping with one of them as `type`."""
