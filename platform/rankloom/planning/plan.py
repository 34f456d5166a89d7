"""`plan`: what a trial, a study or a comparison will take, from its config alone, before anything starts.

The model is opened without weights on the meta device. Memory is forecast by the sums of `training/memory_plan.py`,
which tests hold to measured peaks; speed comes from measured rows or from a calibration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rankloom.config import CompareConfig, StudyConfig, TrialConfig, coerce, dump, load, parse
from rankloom.config.base import ConfigT, read_yaml
from rankloom.config.compare import TEN
from rankloom.config.files import find_config
from rankloom.config.paths import resolve_paths
from rankloom.config.recipes import copy_recipe
from rankloom.config.space import merge
from rankloom.errors import ConfigError
from rankloom.models.device import choose_device
from rankloom.planning.forecast import (
    MethodPlan,
    choose_planned_device,
    forecast_memory,
    name_recipe,
    plan_method,
    read_outline_shape,
    trains_base,
)
from rankloom.planning.heaviest import group_by_model, pick_heaviest
from rankloom.planning.outline import count_parameters, open_outline
from rankloom.planning.recommend import Preference, Recommendation, recommend
from rankloom.planning.rows import RowSizes, read_each_row_sizes, read_row_sizes
from rankloom.planning.speed import Speed, calibrate, find_speed
from rankloom.training.memory import read_free_bytes

AnyConfig = TrialConfig | StudyConfig | CompareConfig
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
TRIED = ({"optim": {"accumulation": 4}}, {"compute": {"activation_checkpointing": True}})
"""Settings that save memory and leave the result as it is."""


@dataclass(frozen=True)
class Plan:
    """What a run will take, by method."""

    name: str
    model: str
    parameters: dict[str, int]
    """The model's parameters by part: embedding, attention, mlp, experts, head, other."""
    device: str
    """cpu or cuda."""
    num_workers: int
    """Devices that share each batch."""
    available: float | None
    """Bytes of memory that each worker has; None: unknown."""
    rows: RowSizes
    methods: tuple[MethodPlan, ...]
    """The config's own methods first, then the recipes that can be combined with its other settings."""
    num_own: int
    """How many of `methods` are the config's own."""
    recommendation: Recommendation | None
    """A method for the budget; None: none was asked for."""

    @property
    def own(self) -> tuple[MethodPlan, ...]:
        """The config's own methods."""
        return self.methods[: self.num_own]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, as `--json` prints it."""
        return asdict(self)


def plan(
    config: AnyConfig | str | Path | Mapping[str, Any],
    *,
    num_workers: int | None = None,
    memory: str | float | None = None,
    prefer: Preference | None = None,
    price_per_hour: float | None = None,
    calibrate: bool = False,
) -> Plan:
    """Return what a run will take: memory by part, whether it fits, the largest batch, fused members, time and cost.

    No weights are loaded and nothing is started. Rows are read where they are here and small; else each counts as
    `data.max_length` tokens. A study is planned by the trials of its space that need most memory, one for each method;
    of several models by the one that needs most.

    Args:
        config: A `TrialConfig`, `StudyConfig` or `CompareConfig`, a dict of its settings, or a YAML file's path.
        num_workers: Number of devices in place of `compute.num_workers`.
        memory: Memory of each device, in bytes or as text such as `16GB`; None: what is free here.
        prefer: Recommend a method that fits: by accuracy, memory or speed.
        price_per_hour: Price of one device for an hour, in place of `compute.price_per_hour`.
        calibrate: Measure the speed on this device, in about ten seconds; False: take it from the measured rows.

    Raises:
        ConfigError: A setting is wrong.
        ModelError: The model's config can't be found.

    Examples:
        >>> import rankloom as rl
        >>> planned = rl.plan({"name": "tickets", "model": "Qwen/Qwen3-0.6B"}, memory="16GB")
        >>> planned.own[0].label
        'lora'
        >>> planned.own[0].fits
        True
    """
    found = config if isinstance(config, AnyConfig) else read_config(config)
    available = None if memory is None else parse_bytes(memory)
    plans = []
    for group in group_by_model(map(resolve_paths, list_trials(found))):
        own = pick_heaviest(group)
        recipes = {name_recipe(trial) for trial in own}
        plans.append(
            plan_trials(
                own, [trial for trial in _list_recipes(own[0]) if name_recipe(trial) not in recipes], found.name,
                num_workers=num_workers, available=available, prefer=prefer, price_per_hour=price_per_hour,
                calibrated=calibrate,
            )
        )  # fmt: skip
    return max(plans, key=lambda planned: max(each.memory.peak for each in planned.own))


def plan_trials(
    own: Sequence[TrialConfig],
    others: Sequence[TrialConfig],
    name: str,
    *,
    num_workers: int | None = None,
    available: float | None = None,
    prefer: Preference | None = None,
    price_per_hour: float | None = None,
    calibrated: bool = False,
) -> Plan:
    """Plan the trials of one model and data set, as `plan` does."""
    first = own[0]
    device = choose_planned_device(first.compute.device)
    workers = num_workers or max(1, first.compute.num_workers)
    model = open_outline(first.model, first.quantization)
    parameters = count_parameters(model)
    if available is None:
        available = find_available(device, workers)
    trials = [*own, *others]
    rows = read_each_row_sizes(trials)
    shapes = [read_outline_shape(model, trial, sizes, device) for trial, sizes in zip(trials, rows, strict=True)]
    speeds = _find_speeds(trials, device, sum(parameters.values()), calibrated=calibrated)
    methods = tuple(
        plan_method(
            trial, shape, sizes, available=available, num_workers=workers, on_gpu=device.type == "cuda",
            speed=speeds.get(name_recipe(trial)), price_per_hour=price_per_hour or trial.compute.price_per_hour,
        )
        for trial, shape, sizes in zip(trials, shapes, rows, strict=True)
    )  # fmt: skip
    return Plan(
        name=name,
        model=first.model.id,
        parameters=parameters,
        device=device.type,
        num_workers=workers,
        available=available,
        rows=max(rows[: len(own)], key=lambda sizes: sizes.batch_tokens),
        methods=methods,
        num_own=len(own),
        recommendation=None if prefer is None else recommend(methods, prefer),
    )


def read_config(given: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> AnyConfig:
    """Return a study if the settings have a `space`, a comparison if they have `methods`, else a trial."""
    tree = given if isinstance(given, Mapping) else read_yaml(find_config(str(given)))
    if "space" in tree:
        return _load(StudyConfig, given, overrides)
    return _load(CompareConfig, given, overrides) if "methods" in tree else _load(TrialConfig, given, overrides)


def _load(cls: type[ConfigT], given: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> ConfigT:
    return coerce(cls, given) if isinstance(given, Mapping) else load(cls, str(given), overrides)


def list_trials(config: AnyConfig) -> list[TrialConfig]:
    """Return the trials that a run can have; of a study those at the ends of its knobs."""
    if isinstance(config, TrialConfig):
        return [config]
    if isinstance(config, CompareConfig):
        seed = config.seeds[0]
        return [config.resolve(each, seed, each.learning_rate) for each in config.methods]
    return list(config.probe_trials())


def parse_bytes(given: str | float) -> float:
    """Return a number of bytes from it, or from text such as 16GB or 15.7GiB.

    Raises:
        ConfigError: it is not a positive size.
    """
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]i?B)?", str(given).strip(), re.IGNORECASE)
    try:
        size = float(found[1]) * UNITS.get((found[2] or "").upper(), 1) if found else 0.0
    except ValueError:
        size = 0.0
    if size <= 0:
        raise ConfigError(f"memory: {given!r} is not a size; give one such as 16GB or 15.7GiB")
    return size


def find_available(device: torch.device, num_workers: int) -> float | None:
    """Return the bytes that each worker has on this machine; None where that is unknown."""
    if device.type == "cuda":  # of the whole device: a look at what is free would take a part of it
        return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    free = read_free_bytes(device)
    return None if free is None else free / num_workers


def find_smaller(trial: TrialConfig, available: float, num_workers: int) -> str | None:
    """Return the first change of settings with which a trial fits, as `key=value`; None if none is enough."""
    device, rows = choose_planned_device(trial.compute.device), read_row_sizes(trial)
    model = open_outline(trial.model, trial.quantization)
    qlora = {"method": {"type": "lora"}, "quantization": "nf4"}
    for change, text in (
        (TRIED[0], "optim.accumulation=4"),
        (TRIED[1], "compute.activation_checkpointing=true"),
        (merge(TRIED[0], TRIED[1]), "optim.accumulation=4 compute.activation_checkpointing=true"),
        ({"method": {"type": "lora"}}, "method.type=lora"),
        (qlora, "method.type=lora quantization=nf4"),
        (merge(qlora, TRIED[1]), "method.type=lora quantization=nf4 compute.activation_checkpointing=true"),
    ):
        changed = _change(trial, change)
        if changed is not None:
            shape = read_outline_shape(model, changed, rows, device)
            memory = forecast_memory(changed, shape, rows, num_workers=num_workers, on_gpu=device.type == "cuda")
            if memory.peak <= available:
                return text
    return None


def _list_recipes(trial: TrialConfig) -> list[TrialConfig]:
    """Return a trial's settings with each of the ten recipes that they can be combined with."""
    return [changed for name in TEN if (changed := _change(trial, copy_recipe(name))) is not None]


def _change(trial: TrialConfig, change: dict[str, Any]) -> TrialConfig | None:
    """Return a trial with other settings; another method keeps the rank, where it has one."""
    tree = dump(trial)
    given = change.get("method", {})
    if "type" in given:
        rank = getattr(trial.method, "rank", None)
        kept = (
            {"rank": rank}
            if rank and trial.method.type in ("lora", "dora") and given["type"] in ("lora", "dora")
            else {}
        )
        tree |= {"method": kept, "quantization": "none"}
        tree["optim"] |= {"loraplus_ratio": 1.0}
    try:
        return parse(TrialConfig, merge(tree, change))
    except ConfigError:  # two settings that exclude each other, such as fp16 weights with full
        return None


def _find_speeds(
    trials: Sequence[TrialConfig], device: torch.device, num_parameters: int, *, calibrated: bool
) -> dict[str, Speed]:
    """Return the speed by recipe; a calibration knows methods by whether they train the base."""
    if not calibrated:
        found = {name_recipe(each): find_speed(device, name_recipe(each), num_parameters) for each in trials}
        return {name: speed for name, speed in found.items() if speed is not None}
    device = choose_device(device.type)
    first = trials[0]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    by_kind = {
        whole: calibrate(open_outline(first.model, first.quantization), trains_base=whole, device=device, dtype=dtype)
        for whole in {trains_base(each) for each in trials}
    }
    return {name_recipe(each): by_kind[trains_base(each)] for each in trials}
