"""A comparison's report, from its folder; one that is not finished shows the study that it is in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rankloom.comparison.page import make_page
from rankloom.comparison.results import CompareResult
from rankloom.comparison.studies import COMPARE, RESULT
from rankloom.config import CompareConfig, load
from rankloom.errors import RankloomError
from rankloom.pages.pieces import Listing, Page, Section
from rankloom.reporting.study import make_study_page
from rankloom.search.study_files import STUDY


def make_comparison_page(folder: Path) -> Page:
    """Return the report of the comparison in a folder.

    Raises:
        RankloomError: a file of the comparison can't be read.
    """
    if (folder / RESULT).is_file():
        try:
            return make_page(CompareResult.model_validate_json((folder / RESULT).read_bytes()))
        except ValueError:
            raise RankloomError(f"{folder / RESULT} is damaged; rankloom compare --resume makes it again") from None
    name = load(CompareConfig, folder / COMPARE).name
    begun = sorted((folder / "studies").glob(f"*/{STUDY}"), key=lambda file: file.stat().st_mtime)
    if not begun:
        config = Listing(title=COMPARE, text=(folder / COMPARE).read_text(encoding="utf-8"))
        sections = (Section(id="config", title="Its settings", blocks=(config,)),)
        return Page(
            title=name, subject="comparison, not finished", summary=("No trial has begun yet.",), sections=sections
        )
    page = make_study_page(begun[-1].parent)
    unfinished = f"The comparison is not finished; this is its study {page.title}, and no verdict on the methods."
    return replace(page, title=name, subject=f"comparison, not finished; {page.subject}", summary=(unfinished,))
