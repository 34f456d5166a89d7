"""Before a run, and before Ray starts: three lines on what it will take, and a refusal of what can't work or fit."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence

from rankloom.config.study import is_fusable
from rankloom.config.trial import TrialConfig
from rankloom.engine.layers import explain_obstacle, find_obstacle
from rankloom.errors import ConfigError
from rankloom.evals.own_metric import MetricFunction
from rankloom.events import OnEvent, PhaseStarted, WarningRaised
from rankloom.planning.forecast import MethodPlan
from rankloom.planning.heaviest import group_by_model, pick_heaviest
from rankloom.planning.outline import open_outline
from rankloom.planning.plan import Plan, find_smaller, plan_trials
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
    searched: Collection[str] = (),
) -> None:
    """Refuse trials that are certain to fail or can't fit, and report in three lines what they will take.

    Args:
        metric: the user's own metric as a function; None: `eval.metric` names it.
        fused: whether those that can share a base will; their notes are reported here, as no run of theirs does it.
        searched: the settings that a study's space varies, by dotted name.

    Raises:
        RankloomError: the error that the run itself would raise.
    """
    trials = list(trials)
    notes = preflight(trials, metric)
    for note in notes if fused else ():
        tell(WarningRaised(note))
    announce_plan(trials, name, tell, fused=fused, searched=searched)


def announce_plan(
    trials: Sequence[TrialConfig], name: str, tell: OnEvent, *, fused: bool = False, searched: Collection[str] = ()
) -> None:
    """Report what trials will take, in three lines a model, and refuse those that can't fit.

    A warning says where the engine can't serve what a run publishes.

    Of each method the trial that needs most memory is reported and checked.
    Where `RAY_ADDRESS` names a cluster, the memory of its workers is unknown here; they check it themselves.

    Args:
        fused: whether those that can share a base will; a host is made as small as memory needs.
        searched: the settings that a study's space varies, by dotted name.

    Raises:
        ConfigError: a trial needs more memory than there is.
    """
    is_elsewhere = bool(os.environ.get("RAY_ADDRESS"))
    for group in map(pick_heaviest, group_by_model(trials)):
        outline = open_outline(group[0].model, group[0].quantization)
        if obstacle := find_obstacle(outline):
            tell(WarningRaised(explain_obstacle(outline, obstacle)))
        planned = plan_trials(group, [], name)
        for line in format_plan(planned, memory_known=not is_elsewhere):
            tell(PhaseStarted("plan", line))
        if not is_elsewhere:
            for trial, method in zip(group, planned.own, strict=True):
                _check(trial, method, planned, searched, fused=fused and is_fusable(trial))


def _check(trial: TrialConfig, method: MethodPlan, planned: Plan, searched: Collection[str], *, fused: bool) -> None:
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
        most = method.largest_batch
        lower = (
            f"leave values above {most} out of the space"
            if "optim.batch_size" in searched
            else f"set optim.batch_size={most}"
        )
        field, advice = f"optim.batch_size={trial.optim.batch_size}", f"{lower} or {advice}"
    raise ConfigError(
        f"{field}: {method.label} needs {format_gb(method.memory.peak)} on the {planned.device}, and "
        f"{format_gb(available)} are free for each worker; {advice}"
    )
