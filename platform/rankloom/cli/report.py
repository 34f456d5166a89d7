"""`rankloom report`: a study, a trial or a comparison as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def complete_subject(incomplete: str) -> list[str]:
    """Return the names of studies, runs and comparisons under the default root."""
    from rankloom.config.trial import OutputConfig

    root = Path(OutputConfig().root).expanduser()
    kinds = ("studies", "runs", "comparisons")
    names = {folder.name for kind in kinds for folder in root.glob(f"{kind}/*/") if folder.name[0] != "."}
    return sorted(name for name in names if name.startswith(incomplete))


def report(
    subject: Annotated[
        str,
        typer.Argument(
            help="The folder of a study, a run or a comparison, or its name under ~/rankloom.",
            metavar="FOLDER|NAME",
            autocompletion=complete_subject,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write.", show_default="report.html in the folder")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Also write each chart to this folder, for slides.")] = None,
) -> None:
    """Write the report of a study, a trial or a comparison: one HTML file that needs no network.

    It has the result in a sentence, test scores, leaderboard, learning curves, the knobs' importance and effect,
    parallel coordinates, costs, the timeline of the hosts, the data with its loss masks, and the command to repeat it;
    of a comparison the table, the tests and the verdict. What is not finished is reported as far as it is.

    Examples:

    rankloom report bank-intents

    rankloom report ~/rankloom/studies/bank-intents --output report.html

    rankloom report bank-intents-lora --png slides
    """
    import rankloom as rl

    file = rl.report(subject, output=output, png=png)
    typer.echo(f"report   {file}")
    if png is not None:
        typer.echo(f"charts   {png}")
