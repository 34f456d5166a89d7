"""How much a serving engine holds and does at once: the bank's, or vLLM's.

Read `rankloom/engine/engine.py` and `rankloom/engine/vllm/engine.py` for what they do with it.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rankloom.config.base import Frozen
from rankloom.errors import ConfigError


class EngineConfig(Frozen):
    """rankloom's own engine, for every kind of adapter. What it holds beside the base: `cache_tokens` and
    `prefix_tokens` of keys and values, and `resident` adapters, of which those at work are there twice unless it
    computes in fp32 on a CPU."""

    type: Literal["bank"] = "bank"
    rows: Annotated[int, Field(ge=1)] | None = None
    """Requests that are computed at once; null: 16 on a CPU, 64 on a GPU, no more than `step_tokens`."""
    cache_tokens: Annotated[int, Field(ge=256)] | None = None
    """Tokens whose keys and values there is room for; null: 16384 on a CPU, on a GPU what half of the memory beside the
    base holds. Where requests outgrow it, the youngest ones wait and are computed again. No request may be longer."""
    step_tokens: Annotated[int, Field(ge=1)] = 512
    """The most tokens that one step computes: longer prompts take several, so that others go on meanwhile."""
    prefix_tokens: Annotated[int, Field(ge=0)] = 8192
    """Tokens of earlier prompts and answers that are kept for requests that begin alike; 0: none."""
    resident: Annotated[int, Field(ge=1)] = 64
    """Adapters in memory; others are loaded when asked for, in the place of the least recently used."""
    waiting: Annotated[int, Field(ge=0)] = 256
    """Requests that may wait beyond those under way; more are refused as overload."""
    split_special_tokens: bool = True
    """Special tokens in the texts of messages are kept as text, and mean nothing; off: they are what the tokenizer
    makes of them, as they always are in the prompt of a completion. As `data.split_special_tokens` of the adapters that
    are served."""

    pack_weights: bool = True
    """Keep a second copy of the base's linear weights in the layout that multiplies fastest. Of use for fp32 on AMD
    processors; elsewhere there is no copy."""

    @model_validator(mode="after")
    def _every_row_moves(self) -> Self:
        if self.rows is not None and self.step_tokens < self.rows:
            raise ValueError(f"step_tokens ({self.step_tokens}) must be at least rows ({self.rows})")
        return self

    def num_rows(self, *, on_gpu: bool) -> int:
        """`rows`, or what null stands for."""
        return self.rows or min(64 if on_gpu else 16, self.step_tokens)


OURS = (
    "--model", "--tokenizer", "--served-model-name", "--host", "--port", "--uds", "--api-key", "--dtype",
    "--enable-lora", "--max-num-seqs", "--max-loras", "--max-cpu-loras", "--max-lora-rank", "--max-model-len",
    "--kv-cache-memory-bytes", "--generation-config", "--enable-prompt-tokens-details",
)  # fmt: skip
"""Options of vLLM's server that other settings stand for, or that rankloom needs as they are."""


_PARALLEL = ("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp")


class VllmConfig(Frozen):
    """vLLM, as a server of its own beside each replica, from a Python environment of its own. It takes LoRA, rsLoRA and
    AdaLoRA; other adapters are refused."""

    type: Literal["vllm"] = "vllm"
    python: str | None = None
    """The interpreter of the environment that vLLM is installed in, on every node that replicas may run on; null:
    `$RANKLOOM_VLLM_PYTHON`."""
    rows: Annotated[int, Field(ge=1)] | None = None
    """Requests that are computed at once; null: 16 on a CPU, 256 on a GPU."""
    waiting: Annotated[int, Field(ge=0)] = 256
    """Requests that may wait beyond those under way; more are refused as overload."""
    split_special_tokens: bool = True
    """Special tokens in the texts of messages are kept as text, and mean nothing; off: they are what the tokenizer
    makes of them, as they always are in the prompt of a completion. As `data.split_special_tokens` of the adapters that
    are served."""
    resident: Annotated[int, Field(ge=1)] = 64
    """Adapters in memory; others are loaded when asked for, in the place of the least recently used."""
    adapters_at_once: Annotated[int, Field(ge=1)] = 16
    """Adapters that one step computes; requests on others wait. vLLM keeps memory for so many of `max_rank`."""
    max_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 16
    """Adapters of a higher rank are refused. Every adapter costs as much as one of this rank, so not higher than
    needed."""
    context: Annotated[int, Field(ge=1)] | None = None
    """The most tokens of prompt and completion together; null: what the base has. The cache must have room for it."""
    cache_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory for keys and values; null: 4 on a CPU, on a GPU what is left of 90 % of the replica's part of it."""
    start_s: Annotated[float, Field(gt=0)] = 900.0
    """The longest that its start may take; vLLM compiles first, for minutes unless `args` has --enforce-eager."""
    args: tuple[str, ...] = ()
    """Further options of vLLM's server, such as --tensor-parallel-size=2."""
    env: dict[str, str] = {}
    """Environment variables of its processes, such as VLLM_CPU_OMP_THREADS_BIND."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.adapters_at_once > self.resident:
            raise ConfigError(f"adapters_at_once ({self.adapters_at_once}) is above resident ({self.resident})")
        for arg in self.args:
            name = arg.partition("=")[0].replace("_", "-")
            if name in OURS:
                raise ConfigError(f"args: {name} is rankloom's to set; use the engine's other settings")
        return self

    def num_rows(self, *, on_gpu: bool) -> int:
        """`rows`, or what null stands for."""
        return self.rows or (256 if on_gpu else 16)

    @property
    def num_gpus(self) -> int:
        """GPUs that its `args` share the base out to."""
        words = [word for arg in self.args for word in arg.split("=", 1)]
        sizes = [words[i + 1 : i + 2] for i, word in enumerate(words) if word.replace("_", "-") in _PARALLEL]
        return math.prod(int(size[0]) for size in sizes if size and size[0].isdigit())


def _bank_unless_told(value: Any) -> Any:
    if isinstance(value, str):
        return {"type": value}
    return {"type": "bank"} | value if isinstance(value, dict) else value


AnyEngineConfig = Annotated[
    EngineConfig | VllmConfig,
    Field(discriminator="type"),
    BeforeValidator(_bank_unless_told, json_schema_input_type=Literal["bank", "vllm"] | EngineConfig | VllmConfig),
]
"""`bank`, `vllm`, or a mapping with the same as `type`; without a type it is the bank."""
