"""Which of many trials decide whether memory suffices: those of one model together, and of each recipe the heaviest."""

from __future__ import annotations

from collections.abc import Iterable

from rankloom.config.trial import TrialConfig
from rankloom.planning.forecast import choose_planned_device, forecast_memory, name_recipe, read_outline_shape
from rankloom.planning.outline import open_outline
from rankloom.planning.rows import read_each_row_sizes


def group_by_model(trials: Iterable[TrialConfig]) -> list[list[TrialConfig]]:
    """Return the trials in groups of one model, device and number of workers."""
    groups: dict[str, list[TrialConfig]] = {}
    for trial in trials:
        groups.setdefault(repr([trial.model, trial.compute.device, trial.compute.num_workers]), []).append(trial)
    return list(groups.values())


def pick_heaviest(trials: Iterable[TrialConfig]) -> list[TrialConfig]:
    """Return of each recipe the trial with the highest forecast peak; the first of equals.

    Args:
        trials: at least one; all of one group of `group_by_model`.
    """
    recipes: dict[str, dict[str, TrialConfig]] = {}
    for trial in trials:
        matters = [trial.method, trial.data, trial.compute, trial.optim.batch_size, trial.optim.accumulation]
        recipes.setdefault(name_recipe(trial), {}).setdefault(repr(matters), trial)
    return [_find_heaviest(list(found.values())) for found in recipes.values()]


def _find_heaviest(trials: list[TrialConfig]) -> TrialConfig:
    first, *others = trials
    if not others:
        return first
    device, model = choose_planned_device(first.compute.device), open_outline(first.model, first.quantization)
    peaks = []
    for trial, rows in zip(trials, read_each_row_sizes(trials), strict=True):
        shape = read_outline_shape(model, trial, rows, device)
        peaks.append(forecast_memory(trial, shape, rows, on_gpu=device.type == "cuda").peak)
    return trials[peaks.index(max(peaks))]
