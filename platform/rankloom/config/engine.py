"""Settings of a serving engine: rankloom's own, vLLM, or whichever fits.

Read `rankloom/engine/engine.py` and `rankloom/engine/vllm/engine.py` next.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rankloom.config.base import Frozen
from rankloom.config.paths import IsPath
from rankloom.errors import ConfigError


class _AnyEngine(Frozen):
    """What both engines have."""

    renamed = {"rows": "max_num_seqs", "waiting": "max_queue", "resident": "max_cpu_loras"}

    max_cpu_loras: Annotated[int, Field(ge=1)] = 64
    """Adapters kept in memory. Another one is loaded on its first request and evicts the least recently used."""
    max_queue: Annotated[int, Field(ge=0)] = 256
    """Requests that may wait for a place in the batch; more are refused with 503."""
    split_special_tokens: bool = True
    """Read special tokens inside chat messages as plain text, so that a message can't forge a turn; off: let the
    tokenizer parse them, as it always does in the prompt of a completion. Use the value of `data.split_special_tokens`
    that the adapters were trained with."""
    tool_call_parser: Literal["hermes", "llama3_json", "mistral", "openai", "qwen3_coder"] | None = None
    """How the base writes calls of tools: Hermes and Qwen, Llama 3, Mistral, or gpt-oss; null: as its chat template
    shows."""


class EngineConfig(_AnyEngine):
    """rankloom's own engine, for every kind of adapter. Beside the base it holds keys and values of `kv_cache_tokens`
    and `prefix_cache_tokens`, and `max_cpu_loras` adapters."""

    renamed = _AnyEngine.renamed | {
        "step_tokens": "max_num_batched_tokens",
        "cache_tokens": "kv_cache_tokens",
        "prefix_tokens": "prefix_cache_tokens",
    }

    type: Literal["bank"] = "bank"
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    """Most sequences in one step; null: 16 on a CPU, 64 on a GPU, at most `max_num_batched_tokens`."""
    kv_cache_tokens: Annotated[int, Field(ge=256)] | None = None
    """Size of the KV cache in tokens; null: 16384 on a CPU, on a GPU as many as fit in half of the memory that the base
    leaves. On a GPU all of it is allocated at the start. When it is full, the youngest sequences are preempted and
    recomputed. No sequence may be longer."""
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens in one step; null: 512 on a CPU, 2048 on a GPU. A longer prompt is split over several steps, so that
    other requests keep streaming."""
    prefix_cache_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens of earlier prompts and completions kept for requests with the same prefix; 0: none; null: 8192 on a CPU,
    on a GPU as many as fit in a tenth of the memory that the base leaves, at most 65536."""

    pack_weights: bool = True
    """Keep a second copy of the base's linear weights in oneDNN's layout, which is faster for fp32 on AMD processors.
    Elsewhere no copy is made."""

    @model_validator(mode="after")
    def _check_batch_size(self) -> Self:
        if self.max_num_seqs and self.max_num_batched_tokens and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs})"
            )
        return self

    def resolve_num_seqs(self, *, on_gpu: bool) -> int:
        """Return `max_num_seqs`, or the default that null stands for."""
        return self.max_num_seqs or min(64 if on_gpu else 16, self.resolve_num_tokens(on_gpu=on_gpu))

    def resolve_num_tokens(self, *, on_gpu: bool) -> int:
        """Return `max_num_batched_tokens`, or the default that null stands for, which every sequence has one of."""
        return self.max_num_batched_tokens or max(2048 if on_gpu else 512, self.max_num_seqs or 0)


OURS = (
    "--model", "--tokenizer", "--served-model-name", "--host", "--port", "--uds", "--api-key", "--dtype",
    "--enable-lora", "--max-num-seqs", "--max-loras", "--max-cpu-loras", "--max-lora-rank", "--max-model-len",
    "--kv-cache-memory-bytes", "--generation-config", "--enable-prompt-tokens-details",
)  # fmt: skip
"""Options of vLLM's server that rankloom sets itself, from other settings or to a value that it needs."""


_PARALLEL = ("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp")


class VllmConfig(_AnyEngine):
    """vLLM, as a server process beside each replica, from a Python environment of its own. It serves LoRA, rsLoRA,
    AdaLoRA and DoRA; other adapters are refused."""

    renamed = _AnyEngine.renamed | {
        "adapters_at_once": "max_loras",
        "max_rank": "max_lora_rank",
        "context": "max_model_len",
        "cache_gib": "kv_cache_gib",
        "start_s": "startup_timeout_s",
    }

    type: Literal["vllm"] = "vllm"
    python: Annotated[str, IsPath(or_id=True)] | None = None
    """Python interpreter of the environment with vLLM, the same path on every node that runs replicas; null:
    `$RANKLOOM_VLLM_PYTHON`."""
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    """Most sequences in one step; null: 16 on a CPU, 256 on a GPU."""
    max_loras: Annotated[int, Field(ge=1)] = 16
    """Most adapters in one step; requests on others wait. vLLM reserves memory for all, at `max_lora_rank`."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 16
    """Highest rank; adapters above it are refused. Every adapter costs as much as one of this rank, so keep it
    low."""
    dora: bool = True
    """Serve DoRA, for which each step scales what the adapted layers give; off: refuse it, and save that time."""
    passthrough: Literal["extras", "all"] = "extras"
    """Which requests vLLM's own server reads, as they came. extras: those with what rankloom's API does not have; all
    others mean what they mean on rankloom's engine. all: every request, so that replicas have less to do, and special
    tokens inside messages are parsed."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of prompt and completion together; null: the base's context. The KV cache must have room for it."""
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    """KV cache in GiB; null: 4 on a CPU, on a GPU what the base leaves of 90 % of the replica's share of memory."""
    startup_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """Seconds to wait for vLLM's start. It compiles for minutes, unless `args` has --enforce-eager."""
    args: tuple[str, ...] = ()
    """More options for vLLM's server, such as --tensor-parallel-size=2."""
    env: dict[str, str] = {}
    """Environment variables for vLLM's processes, such as VLLM_CPU_OMP_THREADS_BIND."""

    @model_validator(mode="after")
    def _check_vllm(self) -> Self:
        if self.max_loras > self.max_cpu_loras:
            raise ConfigError(f"max_loras ({self.max_loras}) is above max_cpu_loras ({self.max_cpu_loras})")
        for arg in self.args:
            name = arg.partition("=")[0].replace("_", "-")
            if name in OURS:
                raise ConfigError(f"args: rankloom sets {name} itself; use the engine's other settings")
        return self

    def resolve_num_seqs(self, *, on_gpu: bool) -> int:
        """Return `max_num_seqs`, or the default that null stands for."""
        return self.max_num_seqs or (256 if on_gpu else 16)

    @property
    def num_gpus(self) -> int:
        """Number of GPUs that `args` spreads the base over."""
        words = [word for arg in self.args for word in arg.split("=", 1)]
        sizes = [words[i + 1 : i + 2] for i, word in enumerate(words) if word.replace("_", "-") in _PARALLEL]
        return math.prod(int(size[0]) for size in sizes if size and size[0].isdigit())


class AutoEngineConfig(Frozen):
    """vLLM where the replicas have a GPU, its environment is there and it can serve base and adapters; else rankloom's
    own engine. `rankloom serve` and `rankloom doctor` say which and why."""

    type: Literal["auto"] = "auto"
    bank: EngineConfig = EngineConfig()
    """Settings of rankloom's own engine, where that is taken."""
    vllm: VllmConfig = VllmConfig()
    """Settings of vLLM, where that is taken."""


def _default_to_bank(value: Any) -> Any:
    if isinstance(value, str):
        return {"type": value}
    return {"type": "bank"} | value if isinstance(value, dict) else value


AnyEngineConfig = Annotated[
    EngineConfig | VllmConfig | AutoEngineConfig,
    Field(discriminator="type"),
    BeforeValidator(
        _default_to_bank,
        json_schema_input_type=Literal["bank", "vllm", "auto"] | EngineConfig | VllmConfig | AutoEngineConfig,
    ),
]
"""`bank`, `vllm`, `auto`, or a mapping with a `type`, which defaults to bank."""
