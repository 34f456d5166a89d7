"""The methods, one file each, and the table from a config's class to its method."""

from __future__ import annotations

from rankloom.config.method import AdaLoraConfig, DoraConfig, FullConfig, GaLoreConfig, LisaConfig, LoraConfig
from rankloom.config.trial import TrialConfig
from rankloom.methods.adalora import AdaLora
from rankloom.methods.base import Method
from rankloom.methods.full import Full
from rankloom.methods.galore import GaLore
from rankloom.methods.lisa import Lisa
from rankloom.methods.lora import Dora, Lora

METHODS: dict[type, type[Method]] = {  # type: ignore[type-arg]
    FullConfig: Full,
    LoraConfig: Lora,
    DoraConfig: Dora,
    AdaLoraConfig: AdaLora,
    GaLoreConfig: GaLore,
    LisaConfig: Lisa,
}


def build_method(trial: TrialConfig, num_steps: int) -> Method:  # type: ignore[type-arg]
    """Return the trial's method for a run of `num_steps` optimiser steps."""
    return METHODS[type(trial.method)](trial.method, seed=trial.seed, num_steps=num_steps)


__all__ = ["METHODS", "Method", "build_method"]
