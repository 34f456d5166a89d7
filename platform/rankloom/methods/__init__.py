"""The methods, one file each, and the table from a config's class to its method."""

from __future__ import annotations

from importlib import import_module

from rankloom.config.method import (
    AdaLoraConfig,
    DoraConfig,
    FullConfig,
    GaLoreConfig,
    LisaConfig,
    LoraConfig,
    MethodConfig,
)
from rankloom.config.trial import TrialConfig
from rankloom.errors import ConfigError
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


def get_method_class(config: MethodConfig) -> type[Method]:  # type: ignore[type-arg]
    """Return the method of a config: one of `METHODS`, or another package's.

    Raises:
        ConfigError: the package's can't be imported.
    """
    if type(config) in METHODS:
        return METHODS[type(config)]
    module, _, name = config.implementation.partition(":")
    try:
        found: type[Method] = getattr(import_module(module), name)  # type: ignore[type-arg]
    except Exception as error:  # another package's import may raise anything
        raise ConfigError(
            f"method.type: {config.implementation} can't be imported: {type(error).__name__}: {error}"
        ) from None
    return found


def build_method(trial: TrialConfig, num_steps: int) -> Method:  # type: ignore[type-arg]
    """Return the trial's method for a run of `num_steps` optimiser steps."""
    return get_method_class(trial.method)(trial.method, seed=trial.seed, num_steps=num_steps)


__all__ = ["METHODS", "Method", "build_method", "get_method_class"]
