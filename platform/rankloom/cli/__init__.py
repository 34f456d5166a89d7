"""The command line: one module per command, thin over `rankloom.launch` and `rankloom.registry`.

Nothing here imports torch, ray or transformers before a command needs them. `main` turns a RankloomError into one
line and an exit code: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted.
"""

from __future__ import annotations

import atexit
import gc
import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import rankloom
from rankloom.cli.adapters import app as adapters_app
from rankloom.cli.compare import compare as compare_command
from rankloom.cli.data import data as data_command
from rankloom.cli.doctor import doctor as doctor_command
from rankloom.cli.evaluate import evaluate as evaluate_command
from rankloom.cli.keys import app as keys_app
from rankloom.cli.plan import plan as plan_command
from rankloom.cli.report import report as report_command
from rankloom.cli.schema import schema as schema_command
from rankloom.cli.serve import serve as serve_command
from rankloom.cli.submit import app as submit_app
from rankloom.cli.train import train as train_command
from rankloom.cli.tune import tune as tune_command
from rankloom.config.printable import escape_unprintable
from rankloom.errors import RankloomError

app = typer.Typer(
    name="rankloom",
    help="Train, search, evaluate and serve low-rank adapters of language models, on a laptop or a Ray cluster.",
    epilog="Start with: rankloom doctor, then rankloom train shipped:trials/lora.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("doctor")(doctor_command)
app.command("schema")(schema_command)
app.command("data")(data_command)
app.command("plan")(plan_command)
app.command("train")(train_command)
app.command("tune")(tune_command)
app.command("compare")(compare_command)
app.command("report")(report_command)
app.command("evaluate")(evaluate_command)
app.command("serve")(serve_command)
app.add_typer(adapters_app, name="adapters")
app.add_typer(keys_app, name="keys")
app.add_typer(submit_app, name="submit")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rankloom {rankloom.__version__}")
        raise typer.Exit


@app.callback()
def _list_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escape_unprintable(super().format(record), keep="\n\t")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    if arguments is None:
        atexit.register(gc.freeze)  # the process ends: its last collections would visit every object, for a second
    if logging.lastResort is not None:  # warnings may quote a record
        logging.lastResort.setFormatter(_Printable())
    try:
        app(args=None if arguments is None else list(arguments), prog_name="rankloom")
    except RankloomError as error:
        text = escape_unprintable(str(error), keep="\n")
        typer.secho(f"error: {text}", fg=typer.colors.RED, err=True)
        sys.exit(error.exit_code)
