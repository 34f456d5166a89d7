"""One method's forecast: memory by part, whether it fits, the largest batch, fused members, time and cost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rankloom.config.method import AdapterConfig
from rankloom.config.study import is_fusable
from rankloom.config.trial import TrialConfig
from rankloom.models import choose_auto_dtype, resolve_dtype
from rankloom.models.device import choose_device
from rankloom.planning.rows import RowSizes
from rankloom.planning.speed import Speed
from rankloom.training.memory import describe_model
from rankloom.training.memory_plan import HostSize, RunMemory, Shape, forecast_run

MOST_ROWS, MOST_MEMBERS = 65_536, 1024
"""The largest batch and host that are looked for."""


@dataclass(frozen=True)
class MethodPlan:
    """What one method will take, on each worker."""

    label: str
    """The recipe's name, such as qlora."""
    trained: int
    """Number of parameters that train."""
    memory: RunMemory
    """Bytes by part on one worker."""
    fits: bool | None
    """Whether the peak is within the memory; None: unknown memory."""
    largest_batch: int | None
    """The largest `optim.batch_size` that fits; 0: not even one row; None: unknown memory."""
    members: int | None
    """Such trials that one host can train at once; None: unknown memory, or a method that can't share a base."""
    speed: Speed | None
    seconds: float | None
    """Seconds of the steps of the whole budget."""
    cost: float | None
    """Price of these seconds, on all devices."""


def name_recipe(trial: TrialConfig) -> str:
    """Return the name of a trial's method with its quantisation and LoRA+, as recipes have it."""
    quantized = {"none": "", "nf4": "q", "int8": "int8-"}[trial.quantization.type]
    return f"{quantized}{trial.method.type}{'-lora-plus' if trial.optim.loraplus_ratio != 1 else ''}".replace(
        "lora-lora-plus", "lora-lora-plus" if quantized else "lora-plus"
    )


def trains_base(trial: TrialConfig) -> bool:
    """Return whether the base's own weights train; the table knows it without the methods' libraries."""
    return trial.method.row.servable == "extracted"


def choose_planned_device(wanted: str) -> torch.device:
    """Return the device of a setting; cuda can be planned for where there is none."""
    return torch.device("cuda") if wanted == "cuda" else choose_device(wanted)


def read_outline_shape(model: PreTrainedModel, trial: TrialConfig, rows: RowSizes, device: torch.device) -> Shape:
    """Return the shape that a trial's base will have, loaded on a device."""
    precision = resolve_dtype(trial.compute.precision, choose_auto_dtype(device))
    return describe_model(
        model,
        getattr(trial.method, "target_modules", "all-linear"),
        experts=bool(getattr(trial.method, "experts", None)),
        predicted_share=rows.predicted_share,
        quantization=trial.quantization.type,
        dtype=precision if trains_base(trial) else resolve_dtype(trial.model.dtype, precision),
        device=device,
    )


def forecast_memory(
    trial: TrialConfig,
    shape: Shape,
    rows: RowSizes,
    *,
    batch_size: int | None = None,
    num_workers: int | None = None,
    on_gpu: bool = False,
) -> RunMemory:
    """Forecast one worker's memory; another batch size than the trial's is of the longest rows alone."""
    workers = num_workers or max(1, trial.compute.num_workers)
    parts = trial.optim.accumulation * workers
    tokens = -(-rows.batch_tokens // parts) if batch_size is None else -(-batch_size // parts) * rows.longest
    return forecast_run(
        shape,
        trial.method,
        tokens,
        num_workers=workers,
        accumulates=trial.optim.accumulation > 1,
        recomputes=trial.compute.activation_checkpointing,
        on_gpu=on_gpu,
    )


def count_members(trial: TrialConfig, shape: Shape, rows: RowSizes, available: float) -> int | None:
    """Return how many trials of this kind a host can train at once; None for a method that can't share a base."""
    if not is_fusable(trial) or not isinstance(trial.method, AdapterConfig) or not shape.targets:
        return None
    rank = int(getattr(trial.method, "rank", trial.method.default_rank))

    def need(num_slots: int) -> float:
        host = HostSize(num_slots, rank, rows.longest, with_magnitudes=trial.method.type == "dora")
        return shape.base_bytes + host.count_bytes(shape)

    return _find_most(need, MOST_MEMBERS, available)


def plan_method(
    trial: TrialConfig,
    shape: Shape,
    rows: RowSizes,
    *,
    available: float | None,
    num_workers: int,
    on_gpu: bool,
    speed: Speed | None,
    price_per_hour: float | None,
) -> MethodPlan:
    """Return what a trial will take.

    Args:
        available: bytes of memory that one worker has; None: unknown.
        num_workers: number of devices that share its batches.
        price_per_hour: price of one device.
    """
    memory = forecast_memory(trial, shape, rows, num_workers=num_workers, on_gpu=on_gpu)

    def need(batch_size: int) -> float:
        return forecast_memory(trial, shape, rows, batch_size=batch_size, num_workers=num_workers, on_gpu=on_gpu).peak

    seconds = None
    if speed is not None and rows.num_steps is not None:
        seconds = rows.num_steps * rows.step_tokens / (speed.tokens_per_s * num_workers)
    return MethodPlan(
        label=name_recipe(trial),
        trained=int(trial.method.count_trained(shape).gradients),
        memory=memory,
        fits=None if available is None else memory.peak <= available,
        largest_batch=None if available is None else _find_most(need, MOST_ROWS, available),
        members=None if available is None else count_members(trial, shape, rows, available),
        speed=speed,
        seconds=seconds,
        cost=None if seconds is None or price_per_hour is None else seconds / 3600 * price_per_hour * num_workers,
    )


def _find_most(need: Callable[[int], float], most: int, available: float) -> int:
    """Return the largest number up to `most` whose need fits; 0: not even one."""
    return bisect_right(range(1, most + 1), available, key=need)
