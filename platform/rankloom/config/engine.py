"""How much a serving engine holds and does at once: the bank's, or vLLM's.

Read `rankloom/engine/engine.py` and `rankloom/engine/vllm/engine.py` for what they do with it.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rankloom.config.base import Frozen
from rankloom.errors import ConfigError

_RENAMED = {
    "rows": "max_num_seqs",
    "waiting": "max_queue",
    "resident": "max_cpu_loras",
}


class EngineConfig(Frozen):
    """rankloom's own engine, for every kind of adapter. Beside the base it holds keys and values of `kv_cache_tokens`
    and `prefix_cache_tokens`, and `max_cpu_loras` adapters; those in use are held twice, except in fp32 on a CPU."""

    renamed = _RENAMED | {
        "step_tokens": "max_num_batched_tokens",
        "cache_tokens": "kv_cache_tokens",
        "prefix_tokens": "prefix_cache_tokens",
    }

    type: Literal["bank"] = "bank"
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    """Requests that are computed at once; null: 16 on a CPU, 64 on a GPU, no more than `max_num_batched_tokens`."""
    kv_cache_tokens: Annotated[int, Field(ge=256)] | None = None
    """Tokens whose keys and values there is room for; null: 16384 on a CPU, on a GPU what half of the memory beside the
    base holds. Where requests outgrow it, the youngest ones wait and are computed again. No request may be longer."""
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = 512
    """The most tokens that one step computes: longer prompts take several, so that others go on meanwhile."""
    prefix_cache_tokens: Annotated[int, Field(ge=0)] = 8192
    """Tokens of earlier prompts and answers that are kept for requests that begin alike; 0: none."""
    max_cpu_loras: Annotated[int, Field(ge=1)] = 64
    """Adapters in memory; others are loaded when asked for, in the place of the least recently used."""
    max_queue: Annotated[int, Field(ge=0)] = 256
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
        if self.max_num_seqs is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs})"
            )
        return self

    def num_seqs(self, *, on_gpu: bool) -> int:
        """`max_num_seqs`, or what null stands for."""
        return self.max_num_seqs or min(64 if on_gpu else 16, self.max_num_batched_tokens)


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

    renamed = _RENAMED | {
        "adapters_at_once": "max_loras",
        "max_rank": "max_lora_rank",
        "context": "max_model_len",
        "cache_gib": "kv_cache_gib",
        "start_s": "startup_timeout_s",
    }

    type: Literal["vllm"] = "vllm"
    python: str | None = None
    """The interpreter of the environment that vLLM is installed in, on every node that replicas may run on; null:
    `$RANKLOOM_VLLM_PYTHON`."""
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    """Requests that are computed at once; null: 16 on a CPU, 256 on a GPU."""
    max_queue: Annotated[int, Field(ge=0)] = 256
    """Requests that may wait beyond those under way; more are refused as overload."""
    split_special_tokens: bool = True
    """Special tokens in the texts of messages are kept as text, and mean nothing; off: they are what the tokenizer
    makes of them, as they always are in the prompt of a completion. As `data.split_special_tokens` of the adapters that
    are served."""
    max_cpu_loras: Annotated[int, Field(ge=1)] = 64
    """Adapters in memory; others are loaded when asked for, in the place of the least recently used."""
    max_loras: Annotated[int, Field(ge=1)] = 16
    """Adapters that one step computes; requests on others wait. vLLM keeps memory for so many of `max_lora_rank`."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 16
    """Adapters of a higher rank are refused. Every adapter costs as much as one of this rank, so not higher than
    needed."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """The most tokens of prompt and completion together; null: what the base has. The cache must have room for it."""
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory for keys and values; null: 4 on a CPU, on a GPU what is left of 90 % of the replica's part of it."""
    startup_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """The longest that its start may take; vLLM compiles first, for minutes unless `args` has --enforce-eager."""
    args: tuple[str, ...] = ()
    """Further options of vLLM's server, such as --tensor-parallel-size=2."""
    env: dict[str, str] = {}
    """Environment variables of its processes, such as VLLM_CPU_OMP_THREADS_BIND."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.max_loras > self.max_cpu_loras:
            raise ConfigError(f"max_loras ({self.max_loras}) is above max_cpu_loras ({self.max_cpu_loras})")
        for arg in self.args:
            name = arg.partition("=")[0].replace("_", "-")
            if name in OURS:
                raise ConfigError(f"args: {name} is rankloom's to set; use the engine's other settings")
        return self

    def num_seqs(self, *, on_gpu: bool) -> int:
        """`max_num_seqs`, or what null stands for."""
        return self.max_num_seqs or (256 if on_gpu else 16)

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
