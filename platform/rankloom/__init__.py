"""rankloom: fine-tune, search and serve low-rank adapters of language models on Ray.

    import rankloom as rl

    result = rl.train(rl.TrialConfig(name="tickets", model="Qwen/Qwen3-0.6B", data={"train": "tickets.csv"}))
    study = rl.tune("study.yaml")
    table = rl.compare("compare.yaml").table
    score = rl.evaluate("tickets@champion")
    with rl.serve("tickets@champion") as endpoint:
        endpoint.client().chat.completions.create(model="tickets", messages=[...])

Importing this package loads neither torch nor ray: each name below is imported from its home when it is first used.
To read the code, begin with `training/loop.py`.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankloom.comparison.compare import compare as compare
    from rankloom.comparison.results import CompareResult as CompareResult
    from rankloom.comparison.results import MethodResult as MethodResult
    from rankloom.config.base import dump as dump
    from rankloom.config.base import load as load
    from rankloom.config.compare import CompareConfig as CompareConfig
    from rankloom.config.compare import MethodChoice as MethodChoice
    from rankloom.config.data import DataConfig as DataConfig
    from rankloom.config.data import Source as Source
    from rankloom.config.engine import AutoEngineConfig as AutoEngineConfig
    from rankloom.config.engine import EngineConfig as EngineConfig
    from rankloom.config.engine import VllmConfig as VllmConfig
    from rankloom.config.method import AdaLoraConfig as AdaLoraConfig
    from rankloom.config.method import DoraConfig as DoraConfig
    from rankloom.config.method import FullConfig as FullConfig
    from rankloom.config.method import GaLoreConfig as GaLoreConfig
    from rankloom.config.method import LisaConfig as LisaConfig
    from rankloom.config.method import LoraConfig as LoraConfig
    from rankloom.config.model import Int8 as Int8
    from rankloom.config.model import ModelConfig as ModelConfig
    from rankloom.config.model import Nf4 as Nf4
    from rankloom.config.serve import AuthConfig as AuthConfig
    from rankloom.config.serve import CanaryConfig as CanaryConfig
    from rankloom.config.serve import LimitsConfig as LimitsConfig
    from rankloom.config.serve import ReplicasConfig as ReplicasConfig
    from rankloom.config.serve import RouteConfig as RouteConfig
    from rankloom.config.serve import ServeConfig as ServeConfig
    from rankloom.config.study import AshaConfig as AshaConfig
    from rankloom.config.study import FifoConfig as FifoConfig
    from rankloom.config.study import FinalConfig as FinalConfig
    from rankloom.config.study import HostsConfig as HostsConfig
    from rankloom.config.study import HyperBandConfig as HyperBandConfig
    from rankloom.config.study import MedianConfig as MedianConfig
    from rankloom.config.study import PbtConfig as PbtConfig
    from rankloom.config.study import SearchConfig as SearchConfig
    from rankloom.config.study import StudyConfig as StudyConfig
    from rankloom.config.trial import BudgetConfig as BudgetConfig
    from rankloom.config.trial import ComputeConfig as ComputeConfig
    from rankloom.config.trial import EvalConfig as EvalConfig
    from rankloom.config.trial import OptimConfig as OptimConfig
    from rankloom.config.trial import OutputConfig as OutputConfig
    from rankloom.config.trial import TrackingConfig as TrackingConfig
    from rankloom.config.trial import TrialConfig as TrialConfig
    from rankloom.deploy.run import Endpoint as Endpoint
    from rankloom.deploy.run import serve as serve
    from rankloom.errors import AdapterNotFoundError as AdapterNotFoundError
    from rankloom.errors import ConfigError as ConfigError
    from rankloom.errors import DataError as DataError
    from rankloom.errors import IncompatibleError as IncompatibleError
    from rankloom.errors import ModelError as ModelError
    from rankloom.errors import RankloomError as RankloomError
    from rankloom.errors import RegistryError as RegistryError
    from rankloom.errors import TrialError as TrialError
    from rankloom.evals.own_metric import Prediction as Prediction
    from rankloom.events import DataLoaded as DataLoaded
    from rankloom.events import Evaluated as Evaluated
    from rankloom.events import PhaseStarted as PhaseStarted
    from rankloom.events import RunFinished as RunFinished
    from rankloom.events import RunResumed as RunResumed
    from rankloom.events import StepFinished as StepFinished
    from rankloom.events import StudyFinished as StudyFinished
    from rankloom.events import StudyProgress as StudyProgress
    from rankloom.events import StudyStatus as StudyStatus
    from rankloom.events import TrialEnded as TrialEnded
    from rankloom.events import TrialEvaluated as TrialEvaluated
    from rankloom.events import TrialStarted as TrialStarted
    from rankloom.events import WarningRaised as WarningRaised
    from rankloom.events import read_events as read_events
    from rankloom.launch.data_check import DataCheck as DataCheck
    from rankloom.launch.data_check import check_data as check_data
    from rankloom.launch.results import EvaluationResult as EvaluationResult
    from rankloom.launch.results import SuiteEvaluation as SuiteEvaluation
    from rankloom.launch.results import TrialResult as TrialResult
    from rankloom.launch.trainer import train as train
    from rankloom.planning.plan import Plan as Plan
    from rankloom.planning.plan import plan as plan
    from rankloom.registry.record import Record as Record
    from rankloom.registry.scorecard import Measures as Measures
    from rankloom.registry.scorecard import Scorecard as Scorecard
    from rankloom.registry.store import Registry as Registry
    from rankloom.reporting.write import report as report
    from rankloom.search.results import ScoredTrial as ScoredTrial
    from rankloom.search.results import StudyResult as StudyResult
    from rankloom.search.study import tune as tune
    from rankloom.suites.evaluate import evaluate as evaluate

__version__ = "0.2.0"

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import, by PEFT, advertises kernels to install

_HOMES: dict[str, tuple[str, ...]] = {
    "comparison.compare": ("compare",),
    "comparison.results": ("CompareResult", "MethodResult"),
    "config.base": ("dump", "load"),
    "config.compare": ("CompareConfig", "MethodChoice"),
    "config.data": ("DataConfig", "Source"),
    "config.engine": ("AutoEngineConfig", "EngineConfig", "VllmConfig"),
    "config.method": ("AdaLoraConfig", "DoraConfig", "FullConfig", "GaLoreConfig", "LisaConfig", "LoraConfig"),
    "config.model": ("Int8", "ModelConfig", "Nf4"),
    "config.serve": ("AuthConfig", "CanaryConfig", "LimitsConfig", "ReplicasConfig", "RouteConfig", "ServeConfig"),
    "config.study": (
        "AshaConfig", "FifoConfig", "FinalConfig", "HostsConfig", "HyperBandConfig", "MedianConfig", "PbtConfig",
        "SearchConfig", "StudyConfig",
    ),
    "config.trial": (
        "BudgetConfig", "ComputeConfig", "EvalConfig", "OptimConfig", "OutputConfig", "TrackingConfig", "TrialConfig",
    ),
    "deploy.run": ("Endpoint", "serve"),
    "errors": (
        "AdapterNotFoundError", "ConfigError", "DataError", "IncompatibleError", "ModelError", "RankloomError",
        "RegistryError", "TrialError",
    ),
    "evals.own_metric": ("Prediction",),
    "events": (
        "DataLoaded", "Evaluated", "PhaseStarted", "RunFinished", "RunResumed", "StepFinished", "StudyFinished",
        "StudyProgress", "StudyStatus", "TrialEnded", "TrialEvaluated", "TrialStarted", "WarningRaised", "read_events",
    ),
    "launch.data_check": ("DataCheck", "check_data"),
    "launch.results": ("EvaluationResult", "SuiteEvaluation", "TrialResult"),
    "launch.trainer": ("train",),
    "planning.plan": ("Plan", "plan"),
    "registry.record": ("Record",),
    "registry.scorecard": ("Measures", "Scorecard"),
    "registry.store": ("Registry",),
    "reporting.write": ("report",),
    "search.results": ("ScoredTrial", "StudyResult"),
    "search.study": ("tune",),
    "suites.evaluate": ("evaluate",),
}  # fmt: skip
"""Module -> the public names that it is the home of; type checkers read the imports above."""

__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"rankloom.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'rankloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
