"""How long a trial trains, and its learning rate along the way: the same in a loop and in a host."""

from __future__ import annotations

import math

from rankloom.config.trial import OptimConfig, TrialConfig

DEFAULT_EPOCHS = 3.0


def num_steps(trial: TrialConfig, batches_per_epoch: int) -> int:
    """Optimiser steps of a trial's budget."""
    return trial.budget.steps or math.ceil((trial.budget.epochs or DEFAULT_EPOCHS) * batches_per_epoch)


def schedule(optim: OptimConfig, step: int, num_steps: int) -> float:
    """The factor on the peak learning rate at step `step` (from 0): a linear warm-up, then the chosen shape."""
    warmup = int(optim.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, num_steps - warmup)
    if optim.schedule == "linear":
        return 1 - done
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
