"""`rankloom train`: one trial, from its config to a version in the registry."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from rankloom.cli.configs import find_config

Config = Annotated[str, typer.Argument(help="A YAML file, or shipped:trials/lora.yaml.", metavar="TRIAL.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, such as method.rank=8.", metavar="key=value")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON; progress goes to stderr.")]
INTERRUPTED = 130


def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of this name.")] = False,
    as_json: Json = False,
) -> None:
    """Train one trial, score it beside its base, and publish the adapter.

    The first Ctrl-C stops after the current step with a checkpoint, the second at once; --resume goes on.

    Examples:

    rankloom train shipped:trials/lora.yaml

    rankloom train trial.yaml method.rank=8 optim.learning_rate=2e-4 name=rank8

    rankloom train trial.yaml --resume
    """
    from rankloom.cli.progress import shown, stop_on_interrupt
    from rankloom.config import TrialConfig, load

    trial = load(TrialConfig, find_config(config), overrides or [])
    from rankloom.launch.trainer import train_trial

    with shown(on_stderr=as_json) as show, stop_on_interrupt() as stop:
        result = train_trial(trial, resume=resume, on_event=show, stop=stop)
    print_result(result, as_json)
    if result["status"] == "interrupted":
        raise typer.Exit(INTERRUPTED)


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """A trial's result for a person, or for a machine."""
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    from rankloom.cli.tables import next_lines, print_scorecard
    from rankloom.registry.scorecard import Scorecard

    if result.get("scorecard"):
        typer.echo()
        print_scorecard(Scorecard.model_validate(result["scorecard"]))
        typer.echo()
    for line in next_lines(result):
        typer.echo(line)
