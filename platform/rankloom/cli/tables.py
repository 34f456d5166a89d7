"""Tables of measures and the commands to run next, for `train` and `evaluate`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from rankloom.config.printable import escape_unprintable

if TYPE_CHECKING:
    from rich.table import Table

    from rankloom.launch.results import TrialResult
    from rankloom.registry.scorecard import Measures, Scorecard

Rows = Sequence[Sequence[str]]


def print_scorecard(scorecard: Scorecard) -> None:
    """Print a trained adapter's measures beside its base's."""
    from rankloom.registry.card import list_scorecard_rows

    print_table(("", "adapter", "base"), list_scorecard_rows(scorecard))


def print_measures(result: Measures | None, base: Measures) -> None:
    """Print an adapter's measures beside its base's, or the base's alone."""
    from rankloom.registry.card import list_measure_rows

    if result is None:
        print_table(("", "base"), [row[:2] for row in list_measure_rows(base, None)])
    else:
        print_table(("", "adapter", "base"), list_measure_rows(result, base))


def list_next_steps(result: TrialResult) -> list[str]:
    """Return where the run's results are, and the commands to run next."""
    if result.status == "interrupted":
        return [f"stopped at step {result.steps}; the same command with --resume continues from there"]
    lines = [f"run      {result.run}"]
    if result.registry is not None:
        registry = shlex.quote(result.registry)
        lines += [
            f"adapter  {result.folder}",
            f"next     rankloom adapters promote {result.adapter} --registry {registry}",
            f"         rankloom evaluate {result.adapter} --registry {registry}",
        ]
    return lines


def print_table(header: Sequence[str], rows: Rows) -> None:
    """Print a rich table on a terminal, aligned plain text in a pipe; leave out a header of empty texts."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(_build_table(header, rows))
        return
    rows = [[escape_unprintable(cell) for cell in row] for row in rows]
    lines = [header, *rows] if any(header) else rows
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _build_table(header: Sequence[str], rows: Rows) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, show_header=any(header), header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(
            *(Text(escape_unprintable(cell)) for cell in row)
        )  # Text, so that [brackets] are not read as markup
    return table
