"""A plan in words: three lines on its own methods, as they come before a run and in `rankloom plan`."""

from __future__ import annotations

from rankloom.planning.forecast import MethodPlan
from rankloom.planning.plan import Plan
from rankloom.training.memory_plan import format_gb


def format_plan(planned: Plan, *, memory_known: bool = True) -> list[str]:
    """Return three lines on a plan's own methods: the model, the memory of the largest, the time."""
    total = sum(planned.parameters.values())
    largest = max(planned.own, key=lambda each: each.memory.peak)
    trained = ", ".join(f"{each.label} trains {format_count(each.trained)}" for each in planned.own[:3])
    more = f" and {len(planned.own) - 3} more methods" if len(planned.own) > 3 else ""
    memory = largest.memory
    parts = (
        f"weights {format_gb(memory.weights)}, optimiser {format_gb(memory.optimizer)}, gradients "
        f"{format_gb(memory.gradients)}, activations {format_gb(memory.activations)}, logits {format_gb(memory.logits)}"
    )
    return [
        f"model   {planned.model}: {format_count(total)} parameters; {trained}{more}",
        f"memory  {largest.label}: {format_gb(memory.peak)} at the peak of a worker ({parts}); "
        + (_describe_fit(largest, planned.available) if memory_known else "the cluster's workers check what they have"),
        f"time    {_describe_time(planned, largest)}",
    ]


def _describe_fit(method: MethodPlan, available: float | None) -> str:
    if available is None:
        return "the device's memory is unknown here"
    fused = f", {method.members} such trials on one base" if method.members else ""
    fits = "it fits" if method.fits else "it does not fit"
    return f"{format_gb(available)} are free: {fits}; largest batch_size {method.largest_batch}{fused}"


def _describe_time(planned: Plan, method: MethodPlan) -> str:
    steps = planned.rows.num_steps
    if method.speed is None:
        return f"no measured row for {method.label} on {planned.device}; rankloom plan --calibrate measures it"
    if method.seconds is None or steps is None:
        return f"{method.label}: {method.speed.tokens_per_s:.3g} tokens/s by {method.speed.source}"
    cost = "" if method.cost is None else f", costs {method.cost:.2f}"
    return (
        f"{method.label}: about {format_seconds(method.seconds)} for {steps} steps{cost}, at "
        f"{method.speed.tokens_per_s:.3g} tokens/s by {method.speed.source}"
    )


def format_count(parameters: float) -> str:
    """Format a number of parameters in millions, or in billions."""
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.4g} M"


def format_seconds(seconds: float) -> str:
    """Format a duration in the unit that suits it."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
