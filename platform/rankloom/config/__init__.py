"""Every setting of the product, checked on a laptop: frozen pydantic models, no torch, no ray.

`load(TrialConfig, path, overrides)` is the entry point; `compatible.COMPATIBLE` lists the allowed combinations.
"""

from rankloom.config.base import coerce, dump, load, parse
from rankloom.config.compare import CompareConfig
from rankloom.config.compatible import COMPATIBLE
from rankloom.config.study import StudyConfig
from rankloom.config.trial import TrialConfig

__all__ = ["COMPATIBLE", "CompareConfig", "StudyConfig", "TrialConfig", "coerce", "dump", "load", "parse"]
