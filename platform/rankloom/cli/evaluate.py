"""`rankloom evaluate`: score a published adapter again, or a trial's untuned base."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankloom.cli.adapters import Root
from rankloom.cli.configs import PREFIX, find_config
from rankloom.cli.train import Json, Overrides
from rankloom.errors import AdapterNotFoundError, ConfigError

if TYPE_CHECKING:
    from rankloom.config import TrialConfig


def evaluate(
    subject: Annotated[
        str,
        typer.Argument(
            help="An adapter (name, name@3, name@alias or its folder), or a trial's YAML file for its untuned base.",
            metavar="ADAPTER|TRIAL.yaml",
        ),
    ],
    root: Root,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Score an adapter beside its base, or the untuned base of a trial, on the trial's test rows.

    Examples:

    rankloom evaluate bank-intents-lora@champion eval.max_test_rows=500

    rankloom evaluate bank-intents-lora data.test=new-messages.csv

    rankloom evaluate bank-intents-lora eval.metric=my_metrics:f1

    rankloom evaluate shipped:trials/lora.yaml
    """
    from rankloom.cli.progress import shown

    trial, adapter = resolve_subject(subject, root, overrides or [])
    from rankloom.launch.evaluation import evaluate as score

    with shown(on_stderr=as_json) as show:
        scored = score(trial, adapter, registry=root, on_event=show)
    scored["adapter"] = adapter
    if as_json:
        typer.echo(json.dumps(scored, indent=2))
        return
    from rankloom.cli.tables import print_measures
    from rankloom.registry.scorecard import Measures

    typer.echo()
    result, base = scored["result"], scored["base"]
    print_measures(result and Measures.model_validate(result), Measures.model_validate(base))


def is_config(subject: str) -> bool:
    """Whether a subject names a config file, not an adapter."""
    return subject.startswith(PREFIX) or subject.endswith((".yaml", ".yml"))


def resolve_subject(subject: str, registry: str, overrides: Sequence[str]) -> tuple[TrialConfig, str | None]:
    """The trial to score by, and the adapter (None: the trial's base): a ref with its number, or a folder."""
    from pydantic import ValidationError

    from rankloom.config import TrialConfig, load, parse
    from rankloom.config.base import apply_overrides
    from rankloom.config.metric import without_own
    from rankloom.registry import Record, Registry
    from rankloom.registry.checks import RECORD

    if is_config(subject):
        return load(TrialConfig, find_config(subject), overrides), None
    folder = Path(subject).expanduser()
    if folder.is_dir():
        try:
            record = Record.model_validate_json((folder / RECORD).read_bytes())
        except (OSError, ValidationError):
            raise ConfigError(
                f"{subject}: a folder without a {RECORD} of rankloom's does not tell its base and data; publish it "
                f"first: rankloom adapters publish {shlex.quote(subject)} --name NAME --base BASE"
            ) from None
        adapter = str(folder)
    else:
        try:
            record = Registry(registry).get(subject)
        except AdapterNotFoundError as error:
            raise AdapterNotFoundError(f"{error}; for a config give a .yaml file") from None
        adapter = record.ref
    if record.data_fingerprint is None and not any(override.startswith("data.") for override in overrides):
        raise ConfigError(f"{record.ref} was not trained by rankloom: name the rows, for example data.test=rows.csv")
    return parse(
        TrialConfig, apply_overrides(without_own(record.trial), overrides), f"the trial of {record.ref}"
    ), adapter
