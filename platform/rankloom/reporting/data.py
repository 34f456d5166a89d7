"""The data of a report: counts, warnings, lengths, labels, and example rows with their loss masks."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from rankloom.config import StudyConfig, TrialConfig
from rankloom.errors import RankloomError
from rankloom.pages.pieces import Block, Cell, ExampleRows, Facts, Line, Note, Page, Section, Table
from rankloom.reporting.charts import draw_labels, draw_lengths

if TYPE_CHECKING:
    from rankloom.data.check import SplitReport
    from rankloom.launch.data_check import DataCheck

NUM_CHARTED = 100
"""Labels of a chart; a data set with more gets a sentence alone."""
COUNTS = {
    "rows": "rows",
    "tokens": "tokens",
    "trained_tokens": "trained on",
    "median_length": "median length",
    "p95_length": "95 % are below",
    "max_length": "longest",
    "truncated": "cut",
    "empty": "empty, dropped",
    "over_long": "too long, dropped",
    "duplicates": "repeated",
    "conflicts": "contradicting",
}
"""Field of a split's report -> its column."""


def make_data_page(checks: tuple[DataCheck, ...]) -> Page:
    """Return the page of data checks alone."""
    first = checks[0]
    warnings = sum(len(check.report.warnings) for check in checks)
    rows = ", ".join(f"{split.rows:,} {name} rows" for name, split in first.report.splits.items())
    summary = f"{first.name} reads {rows}, with {warnings or 'no'} warning{'' if warnings == 1 else 's'}."
    sections = tuple(
        Section(
            id=f"data-{number}", title=", ".join(check.sources.values()), blocks=make_data_blocks(check, f"d{number}")
        )
        for number, check in enumerate(checks)
    )
    return Page(title=first.name, subject="data check", summary=(summary,), sections=sections)


def make_data_section(config: TrialConfig | StudyConfig, digests: Collection[str]) -> Section:
    """Return the data of a run, read again here; a note where the rows can't be read, or are not those of the run.

    Args:
        digests: the hashes of the rows that the run trained on, as its origin.json has them; empty: it has none.
    """
    from rankloom.launch.data_check import check_data

    blocks: list[Block] = []
    try:
        for number, check in enumerate(check_data(config)):
            if digests and check.digest not in digests:
                text = (
                    "These are not the rows that were trained on: the data, the tokenizer or the template has changed."
                )
                blocks.append(Note(text=text, is_warning=True))
            blocks += make_data_blocks(check, f"d{number}")
    except RankloomError as error:
        blocks.append(Note(text=f"The rows can't be read here: {error}"))
    return Section(id="data", title="Data", blocks=tuple(blocks))


def make_data_blocks(check: DataCheck, id: str) -> tuple[Block, ...]:
    """Return the pieces of one check; `id` begins the ids of its charts."""
    report = check.report
    facts = Facts(
        facts=(
            *((f"{name} from", source) for name, source in check.sources.items()),
            ("format", report.format),
            ("rendered by", f"{check.template}, tokenizer of {check.model}"),
            ("data.max_length", f"{check.max_length:,} tokens"),
        )
    )
    blocks: list[Block] = [facts, _build_counts(report.splits)]
    blocks += [Note(text=warning, is_warning=True) for warning in report.warnings]
    blocks += [
        draw_lengths(
            ((each.low, each.high, each.rows) for each in bins), f"{id}-{name}-lengths", f"Lengths of {name} rows",
            check.max_length,
        )
        for name, bins in check.lengths.items()
    ]  # fmt: skip
    labels = report.splits["train"].labels
    if labels and len(labels) <= NUM_CHARTED:
        blocks.append(draw_labels(labels, f"{id}-labels", "Rows of each label in train"))
    elif labels:
        low, high = min(labels.values()), max(labels.values())
        blocks.append(Note(text=f"{len(labels):,} labels have {low:,} to {high:,} rows each in train."))
    blocks.append(Note(text="Below, the tokens that carry loss are marked; the others are only read."))
    blocks += [ExampleRows(title=f"Example rows of {name}", rows=rows) for name, rows in check.examples.items() if rows]
    return tuple(blocks)


def _build_counts(splits: dict[str, SplitReport]) -> Table:
    lines = tuple(
        Line(cells=(Cell(text=name), *(_format_count(getattr(split, field)) for field in COUNTS)))
        for name, split in splits.items()
    )
    return Table(
        caption="Rows and tokens of each split", header=("split", *COUNTS.values()), lines=lines
    ).drop_empty_columns()


def _format_count(value: float) -> Cell:
    return Cell(text=f"{value:,.0f}" if value else "", value=value)


def read_digests(files: Collection[Path]) -> dict[str, str]:
    """Return data's hash -> the libraries' versions as text, of each origin.json that can be read."""
    from rankloom.training.resume_check import Origin

    found = {}
    for file in files:
        try:
            origin = Origin.model_validate_json(file.read_bytes())
        except (OSError, ValueError):
            continue
        found[origin.data] = ", ".join(f"{name} {number}" for name, number in origin.versions)
    return found
