"""`rankloom data`: check the rows of a trial or a study, and show them as the model sees them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankloom.cli.options import Json, Overrides, print_json
from rankloom.config.printable import escape_unprintable

if TYPE_CHECKING:
    from rich.text import Text

    from rankloom.data.preview import RowPreview
    from rankloom.launch.data_check import DataCheck

MARKS = ("⟦", "⟧")
"""Around trained tokens where there are no colours."""
NUM_LABELS = 12
"""Labels that are listed with their rows; of more, the rarest and the most frequent."""
CONFIG = "A trial's or a study's YAML file, or shipped:trials/lora.yaml."


def data(
    config: Annotated[str, typer.Argument(help=CONFIG, metavar="CONFIG.yaml")],
    overrides: Overrides = None,
    num_rows: Annotated[int, typer.Option("--rows", min=0, help="Example rows of each split to show.")] = 3,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with the same to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Check a trial's or a study's rows without training: counts, warnings, and rows as the model sees them.

    Tokens that carry loss are marked. No weights are loaded and no Ray is started. Exit code 0: the rows can be
    trained on, perhaps with warnings; 1: they can't; 2: a setting is wrong.

    Examples:

    rankloom data shipped:trials/lora.yaml

    rankloom data trial.yaml data.max_length=256 data.train_on=all --rows 10

    rankloom data study.yaml --html data.html

    rankloom data trial.yaml --json
    """
    import rankloom as rl
    from rankloom.launch.data_check import read_config

    checks = rl.check_data(read_config(config, overrides or []), num_examples=num_rows)
    if html is not None:
        from rankloom.reporting.write import write_data_page

        write_data_page(checks, html)
        typer.echo(f"page     {html}", err=as_json)
    if as_json:
        print_json({"checks": [check.to_dict() for check in checks]})
    elif html is None:
        for check in checks:
            _print(check)


def _print(check: DataCheck) -> None:
    from rich.console import Console
    from rich.text import Text

    from rankloom.cli.tables import print_table

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        Text(escape_unprintable(f"{check.name}: {check.report.format}, {check.template}, {check.model}"), "bold")
    )
    print_table(*_drop_empty_columns([HEADER, *(_format_counts(check, split) for split in check.report.splits)]))
    for split, report in check.report.splits.items():
        if report.labels:
            console.print(Text(escape_unprintable(f"{split} labels: {_format_labels(report.labels)}"), "dim"))
    for warning in check.report.warnings:
        console.print(Text(escape_unprintable(f"warning: {warning}"), "yellow"))
    for split, rows in check.examples.items():
        total = check.report.splits[split].rows
        for row in rows:
            title = f"{split} row {row.row} of {total:,}: {row.tokens} tokens, {row.trained_tokens} trained"
            console.print(Text(f"\n{title}", "bold"))
            console.print(_render_row(row, plain=not sys.stdout.isatty()))


HEADER = ("split", "rows", "tokens", "trained", "median", "longest", "labels", "cut", "dropped", "repeated")


def _format_counts(check: DataCheck, name: str) -> tuple[str, ...]:
    split = check.report.splits[name]
    return (
        name,
        f"{split.rows:,}",
        f"{split.tokens:,}",
        f"{split.trained_tokens:,}",
        f"{split.median_length:.0f}",
        str(split.max_length),
        str(len(split.labels)) if split.labels else "",
        *(str(count or "") for count in (split.truncated, split.empty + split.over_long, split.duplicates)),
    )


def _drop_empty_columns(lines: list[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and the rows of a table without the columns that no row fills."""
    kept = [number for number in range(len(HEADER)) if any(line[number] for line in lines[1:])]
    header, *rows = [tuple(line[number] for number in kept) for line in lines]
    return header, rows


def _format_labels(labels: dict[str, int]) -> str:
    ordered = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{label} {count}" for label, count in ordered]
    if len(listed) > NUM_LABELS:
        listed = [*listed[: NUM_LABELS // 2], f"... {len(listed) - NUM_LABELS} more ...", *listed[-NUM_LABELS // 2 :]]
    return ", ".join(listed)


def _render_row(row: RowPreview, *, plain: bool) -> Text:
    from rich.text import Text

    text = Text()
    for segment in row.segments:
        shown = escape_unprintable(segment.text, keep="\n\t")
        if segment.weight and plain:
            text.append(shown.join(MARKS))
        else:
            text.append(shown, "black on green" if segment.weight else "")
    return text
