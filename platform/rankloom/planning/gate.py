"""Before a run, and before Ray starts: three lines on what it will take, and a refusal of what can't work or fit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from rankloom.config.study import is_fusable
from rankloom.config.trial import TrialConfig
from rankloom.errors import ConfigError
from rankloom.evals.own_metric import MetricFunction
from rankloom.events import OnEvent, PhaseStarted, WarningRaised
from rankloom.planning.forecast import MethodPlan
from rankloom.planning.plan import Plan, find_smaller, pick_largest, plan_trials
from rankloom.planning.words import format_plan
from rankloom.training.memory_plan import format_gb
from rankloom.training.preflight import preflight

CERTAIN = 0.9
"""The share of a forecast that a run takes at least; tests hold forecasts to 10 %."""


def vet_trials(
    trials: Iterable[TrialConfig],
    name: str,
    tell: OnEvent,
    metric: MetricFunction | None = None,
    *,
    fused: bool = False,
) -> None:
    """Refuse trials that are certain to fail or can't fit, and report in three lines what they will take.

    Args:
        metric: the user's own metric as a function; None: `eval.metric` names it.
        fused: whether those that can share a base will; their notes are reported here, as no run of theirs does it.

    Raises:
        RankloomError: the error that the run itself would raise.
    """
    trials = list(trials)
    notes = preflight(trials, metric)
    for note in notes if fused else ():
        tell(WarningRaised(note))
    announce_plan(pick_largest(trials), name, tell, fused=fused)


def announce_plan(trials: Sequence[TrialConfig], name: str, tell: OnEvent, *, fused: bool = False) -> None:
    """Report what trials of one model will take, in three lines, and refuse those that can't fit.

    Where `RAY_ADDRESS` names a cluster, the memory of its workers is unknown here; they check it themselves.

    Args:
        fused: whether those that can share a base will; a host is made as small as memory needs.

    Raises:
        ConfigError: a trial needs more memory than there is.
    """
    is_elsewhere = bool(os.environ.get("RAY_ADDRESS"))
    for group in _group_by_model(trials):
        planned = plan_trials(group, [], name)
        for line in format_plan(planned, memory_known=not is_elsewhere):
            tell(PhaseStarted("plan", line))
        if not is_elsewhere:
            for trial, method in zip(group, planned.own, strict=True):
                _check(trial, method, planned, fused=fused and is_fusable(trial))


def _group_by_model(trials: Iterable[TrialConfig]) -> list[list[TrialConfig]]:
    groups: dict[str, list[TrialConfig]] = {}
    for trial in trials:
        groups.setdefault(repr([trial.model, trial.data, trial.compute]), []).append(trial)
    return list(groups.values())


def _check(trial: TrialConfig, method: MethodPlan, planned: Plan, *, fused: bool) -> None:
    available = planned.available
    if available is None:
        return
    if fused and method.members != 0:
        return
    if not fused and CERTAIN * method.memory.peak <= available:
        return
    smaller = find_smaller(trial, available, planned.num_workers)
    advice = f"set {smaller}, with which it fits" if smaller else "take a smaller model or a larger device"
    field = f"method.type={trial.method.type}, quantization={trial.quantization.type}"
    if not fused and method.largest_batch:
        field, advice = (
            f"optim.batch_size={trial.optim.batch_size}",
            f"set optim.batch_size={method.largest_batch} or {advice}",
        )
    raise ConfigError(
        f"{field}: {method.label} needs {format_gb(method.memory.peak)} on the {planned.device}, and "
        f"{format_gb(available)} are free for each worker; {advice}"
    )
