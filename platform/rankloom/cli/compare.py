"""`rankloom compare`: methods side by side on one task, and which differences are real."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from rankloom.cli.options import INTERRUPTED, CompareFile, Json, Overrides, ResumeComparison, print_json

if TYPE_CHECKING:
    from rankloom.comparison.results import CompareResult

Promote = Annotated[
    bool, typer.Option("--promote", help="Promote the adapter of the method that leads on the validation rows.")
]


def compare(
    config: CompareFile,
    overrides: Overrides = None,
    resume: ResumeComparison = False,
    promote: Promote = False,
    as_json: Json = False,
) -> None:
    """Compare methods on one task: the same rows, the same budget, several seeds.

    Each method trains with each seed; its accuracy, memory, speed and size are measured, and paired tests on the test
    rows say which differences are real. The tables are also written as Markdown, CSV, parquet and HTML. After Ctrl-C,
    --resume continues the comparison.

    Examples:

    rankloom compare shipped:compare/quick.yaml

    rankloom compare compare.yaml tune=3 'seeds=[0, 1, 2, 3, 4]' name=tuned

    rankloom compare compare.yaml --resume --promote
    """
    import rankloom as rl
    from rankloom.cli.progress import interrupt_at_events
    from rankloom.cli.study_view import show_study

    comparison = rl.load(rl.CompareConfig, config, overrides or [])
    try:
        with show_study(on_stderr=as_json) as view, interrupt_at_events(view) as show:
            result = rl.compare(comparison, resume=resume, on_event=show)
    except KeyboardInterrupt:
        typer.echo("aborted; --resume continues from what was saved", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result, config, overrides or [], promote=promote)
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if promote:
        _promote(result, quiet=as_json)


def _print(result: CompareResult, config: str, overrides: Sequence[str], *, promote: bool) -> None:
    from rankloom.cli.tables import print_table
    from rankloom.comparison.table import build_cost_rows, build_quality_rows

    typer.echo()
    if result.status == "interrupted":
        again = shlex.join(["rankloom", "compare", config, *overrides, "--resume"])
        typer.echo(f"stopped; {again} continues from here")
        return
    for rows in (build_quality_rows(result), build_cost_rows(result)):
        print_table(rows[0], rows[1:])
        typer.echo()
    for sentence in (*result.verdict, *result.notes):
        typer.echo(sentence)
    typer.echo(f"\ntables   {result.folder}")
    if result.adapter and result.registry and not promote:
        typer.echo(f"next     rankloom adapters promote {result.adapter} --registry {shlex.quote(result.registry)}")


def _promote(result: CompareResult, *, quiet: bool) -> None:
    from rankloom.errors import TrialError
    from rankloom.registry import Registry

    if result.adapter is None or result.registry is None:
        raise TrialError("--promote: the comparison published no adapter; compare with publish=true")
    record = Registry(result.registry).promote(result.adapter)
    typer.echo(f"promoted {record.ref}: champion of {record.name}", err=quiet)
