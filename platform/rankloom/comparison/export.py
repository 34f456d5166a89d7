"""The files of a comparison: report.html, table.md, table.csv, table.parquet, tests.csv, and result.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankloom.comparison.page import make_page
from rankloom.comparison.results import CompareResult
from rankloom.comparison.table import COSTS_NOTE, build_cost_rows, build_quality_rows, build_records
from rankloom.pages.html import render


def export(result: CompareResult, folder: Path) -> None:
    """Write the files into the comparison's folder; result.json, which says that it is done, last."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = build_records(result)
    _replace(folder / "report.html", render(make_page(result)))
    _replace(folder / "table.md", render_markdown(result))
    _replace(folder / "table.csv", format_csv(rows))
    _replace(folder / "tests.csv", format_csv([test.model_dump() | {"is_real": test.is_real} for test in result.tests]))
    staged = folder / "table.staged"
    parquet.write_table(pa.Table.from_pylist(rows), staged)
    staged.replace(folder / "table.parquet")
    _replace(folder / "result.json", json.dumps(result.to_dict(), indent=2) + "\n")


def render_markdown(result: CompareResult) -> str:
    """Return the comparison as a Markdown document."""
    parts = [f"# {result.name}", " ".join(result.verdict), *(f"- {note}" for note in result.notes)]
    parts += [
        f"{result.num_rows} test rows. Intervals of 95 % are over seeds and test rows; the measure that methods are "
        f"tested by is {result.measure_name}.",
        _render_table(build_quality_rows(result)),
        COSTS_NOTE,
        _render_table(build_cost_rows(result)),
    ]
    if result.tests:
        header = ("first", "second", f"difference in {result.measure_name}", "p", "p, Holm", "real")
        rows = [
            (
                test.first, test.second, f"{test.difference:+.4g}", f"{test.p_value:.3g}", f"{test.adjusted:.3g}",
                "yes" if test.is_real else "no",
            )
            for test in result.tests
        ]  # fmt: skip
        parts += ["Every pair, tested on the same seeds and test rows:", _render_table([header, *rows])]
    return "\n\n".join(parts) + "\n"


def format_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with equal keys as CSV, with a header."""
    file = io.StringIO()
    if rows:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return file.getvalue()


def _render_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _replace(path: Path, text: str) -> None:
    staged = path.with_suffix(".staged")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)
