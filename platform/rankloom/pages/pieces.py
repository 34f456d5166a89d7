"""Pieces: what a report is made of, as frozen dataclasses. They know nothing of studies, trials or HTML.

A `Page` has sections, a section has blocks. Every text is plain text; `html.py` escapes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

if TYPE_CHECKING:
    from rankloom.data.preview import RowPreview

COLOURS = ("#3a7bd5", "#d97706", "#1f9d6b", "#c2478f", "#7a68d8", "#8b8f9a", "#b4532a", "#1797a6")
"""Distinguishable with the common colour blindnesses, and legible on white and on black."""
CHOSEN = "chosen === '' || datum.trial === chosen"
"""Vega's expression for a chart's trial that is chosen, or where none is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell of a table."""

    text: str
    value: float | str | None = None
    """What the column is sorted by; None: the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A row of a table."""

    cells: tuple[Cell, ...]
    mark: str = ""
    """What the charts call the row's trial, which choosing the row highlights there; empty: the row is not a trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table that a reader can sort."""

    kind: ClassVar[str] = "table"
    caption: str
    header: tuple[str, ...]
    lines: tuple[Line, ...]
    num_texts: int = 1
    """Columns from the left that hold text; the others hold numbers, which are aligned to the right."""

    def drop_empty_columns(self) -> Table:
        """Return the table without columns of numbers in which no cell has a text."""
        kept = [
            number
            for number in range(len(self.header))
            if number < self.num_texts or any(line.cells[number].text for line in self.lines)
        ]
        lines = tuple(replace(line, cells=tuple(line.cells[number] for number in kept)) for line in self.lines)
        return replace(self, header=tuple(self.header[number] for number in kept), lines=lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A Vega-Lite chart."""

    kind: ClassVar[str] = "chart"
    id: str
    """Unique in its page: letters, digits and '-'; also the name of its PNG."""
    title: str
    description: str
    """What it shows, for readers who do not see it."""
    spec: dict[str, Any]
    """Vega-Lite without size, title and configuration. Its parameter `chosen` is the mark of the highlighted trial."""
    height: int = 280
    """Pixels of the plot without axes."""
    is_small: bool = False
    """Whether several stand beside each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A text to copy: a command or a file."""

    kind: ClassVar[str] = "listing"
    title: str
    text: str
    is_folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A paragraph."""

    kind: ClassVar[str] = "note"
    text: str
    is_warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleRows:
    """Example rows of one split, with the tokens that carry loss marked."""

    kind: ClassVar[str] = "rows"
    title: str
    rows: tuple[RowPreview, ...]


Block: TypeAlias = Table | Chart | Facts | Listing | Note | ExampleRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page, with an entry in its navigation."""

    id: str
    """Unique in its page: letters, digits and '-'."""
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A report."""

    title: str
    subject: str
    """What it reports on: study, trial, data or comparison, and its status."""
    summary: tuple[str, ...]
    """The result in a sentence, and what qualifies it."""
    sections: tuple[Section, ...]

    @property
    def charts(self) -> Iterator[Chart]:
        """Its charts, in their order."""
        for section in self.sections:
            yield from (block for block in section.blocks if isinstance(block, Chart))
