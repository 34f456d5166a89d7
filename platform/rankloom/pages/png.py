"""PNG: a page's charts as pictures for slides. vl-convert draws them without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import vl_convert

from rankloom.errors import RankloomError
from rankloom.pages.html import THEME
from rankloom.pages.pieces import Chart, Page

WIDTH = 800
"""Pixels of a plot without axes, before `SCALE`."""
SCALE = 2.0
SLIDE = {"background": "white", "font": "sans-serif", "title": {"fontSize": 16, "anchor": "start", "offset": 12}}


def write_pngs(page: Page, folder: Path) -> list[Path]:
    """Write each chart into a folder, as its id with `.png`; return the files.

    Raises:
        RankloomError: the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for chart in page.charts:
            file = folder / f"{chart.id}.png"
            file.write_bytes(vl_convert.vegalite_to_png(_make_slide(chart), scale=SCALE))
            written.append(file)
    except OSError as error:
        raise RankloomError(f"--png {folder}: can't be written: {error}; choose another folder") from None
    return written


def _make_slide(chart: Chart) -> dict[str, Any]:
    size = {"width": WIDTH, "height": max(chart.height, WIDTH // 2)}
    return chart.spec | size | {"title": chart.title, "config": THEME | SLIDE}
