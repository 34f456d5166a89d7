"""`rankloom tune`: a study, from its config to the winner in the registry."""

from __future__ import annotations

import json
import threading
from typing import Annotated, Any

import typer

from rankloom.cli.configs import find_config
from rankloom.cli.train import INTERRUPTED, Json, Overrides

Study = Annotated[str, typer.Argument(help="A YAML file, or shipped:studies/quickstart.yaml.", metavar="STUDY.yaml")]


def tune(
    config: Study,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the study of this name.")] = False,
    as_json: Json = False,
) -> None:
    """Search for the best trial: many train at once on one shared base.

    The best by validation are scored on the test rows and published: the winner under the study's name, each method's
    best under its own. Ctrl-C leaves a study that --resume continues.

    Examples:

    rankloom tune shipped:studies/quickstart.yaml

    rankloom tune study.yaml search.num_trials=32 trial.budget.steps=100 name=longer

    rankloom tune study.yaml --resume
    """
    from rankloom.cli.study_view import shown
    from rankloom.config import StudyConfig, load

    study = load(StudyConfig, find_config(config), overrides or [])
    from rankloom.search.study import run

    try:
        with shown(on_stderr=as_json) as show:
            # Ray Tune catches the first Ctrl-C itself, saves and returns
            result = run(study, resume=resume, on_event=show, stop=threading.Event())
    except KeyboardInterrupt:  # before it searched, or the second one
        typer.echo("aborted; --resume goes on with what was saved", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        _print_result(result, config, overrides or [])
    if result["status"] == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _print_result(result: dict[str, Any], config: str, overrides: list[str]) -> None:
    from rankloom.cli.study_view import result_lines, result_rows
    from rankloom.cli.tables import print_table

    typer.echo()
    if result["status"] == "done":
        header, *rows = result_rows(result)
        print_table(header, rows)
        typer.echo()
    for line in result_lines(result, config, overrides):
        typer.echo(line)
