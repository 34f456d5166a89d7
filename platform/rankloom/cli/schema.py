"""`rankloom schema`: the JSON Schema of a config, for editors."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from rankloom.errors import ConfigError


def schema(
    name: Annotated[str, typer.Argument(help="Which config: trial, study, compare or serve.", metavar="NAME")],
) -> None:
    """Print the JSON Schema of a config file, for an editor's completion and checks.

    Example: rankloom schema trial > trial.schema.json
    """
    from rankloom.config import CompareConfig, StudyConfig, TrialConfig
    from rankloom.config.base import Frozen
    from rankloom.config.serve import ServeConfig

    configs: dict[str, type[Frozen]] = {
        "trial": TrialConfig,
        "study": StudyConfig,
        "compare": CompareConfig,
        "serve": ServeConfig,
    }
    if name not in configs:
        raise ConfigError(f"schema {name!r}: unknown config; allowed: {', '.join(configs)}")
    typer.echo(json.dumps(configs[name].model_json_schema(), indent=2))
