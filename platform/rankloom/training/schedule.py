"""A trial's number of steps and its learning-rate schedule, shared by `loop.py` and `fused/host.py`."""

from __future__ import annotations

import math

from rankloom.config.trial import OptimConfig, TrialConfig

DEFAULT_EPOCHS = 3.0
DIVERGED = (
    "training diverged at step {step}: loss {loss}, gradient norm {norm}; lower optim.learning_rate ({rate:g}) "
    "or raise optim.warmup_fraction"
)
"""The error of a trial whose loss or gradient is not finite."""


def count_steps(trial: TrialConfig, batches_per_epoch: int) -> int:
    """Return the number of optimiser steps in a trial's budget."""
    return trial.budget.steps or math.ceil((trial.budget.epochs or DEFAULT_EPOCHS) * batches_per_epoch)


def schedule(optim: OptimConfig, step: int, num_steps: int) -> float:
    """Return the factor on the peak learning rate at `step` (from 0): a linear warm-up, then the chosen shape."""
    warmup = int(optim.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, num_steps - warmup)
    if optim.schedule == "linear":
        return 1 - done
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
