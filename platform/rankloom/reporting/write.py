"""`report`: find a trial, a study or a comparison, and write its report."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankloom.comparison.studies import COMPARE, COMPARISONS
from rankloom.config.trial import OutputConfig
from rankloom.errors import ConfigError, RankloomError
from rankloom.launch.run_folder import TRIAL
from rankloom.pages.html import render
from rankloom.pages.pieces import Page
from rankloom.pages.png import write_pngs
from rankloom.reporting.comparison import make_comparison_page
from rankloom.reporting.data import make_data_page
from rankloom.reporting.run import make_run_page
from rankloom.reporting.study import make_study_page
from rankloom.search.study_files import STUDY

if TYPE_CHECKING:
    from rankloom.launch.data_check import DataCheck

REPORT = "report.html"
"""Name of a report in the folder of what it reports on."""
KINDS: dict[str, tuple[str, Callable[[Path], Page]]] = {
    "studies": (STUDY, make_study_page),
    "runs": (TRIAL, make_run_page),
    COMPARISONS: (COMPARE, make_comparison_page),
}
"""Subfolder of `output.root` -> the file that tells a folder in it, and what makes its page."""


def report(subject: str | Path, *, output: str | Path | None = None, png: str | Path | None = None) -> Path:
    """Write the report of a study, a trial or a comparison: one HTML file that opens without a network.

    It shows the result in a sentence, the scores on the test rows, the leaderboard, learning curves, the importance and
    effect of each knob, parallel coordinates, quality against cost, the timeline of the hosts, the data with example
    rows, the environment, and the command to repeat it; of a comparison its table, its tests and its verdict. What is
    not finished is reported as far as it is.

    Args:
        subject: The folder of a study, a run or a comparison, or its name under `~/rankloom`.
        output: The file to write; None: report.html in the subject's folder.
        png: A folder to write each chart to as a PNG, for slides.

    Returns:
        The file.

    Raises:
        ConfigError: There is no such study, run or comparison.
        RankloomError: Its files can't be read, or the report can't be written.

    Examples:
        >>> import rankloom as rl
        >>> rl.report("ticket-search", output="report.html")
        PosixPath('report.html')
    """
    folder = find_folder(str(subject))
    page = next(make_page(folder) for file, make_page in KINDS.values() if (folder / file).is_file())
    if png is not None:
        write_pngs(page, Path(png).expanduser())
    return _write(page, Path(output).expanduser() if output is not None else folder / REPORT)


def write_data_page(checks: Sequence[DataCheck], output: Path) -> Path:
    """Write the page of data checks; return its file."""
    return _write(make_data_page(tuple(checks)), output)


def find_folder(subject: str) -> Path:
    """Return the folder of a study, a run or a comparison that a path or a name means.

    Raises:
        ConfigError: there is none, or more than one of them has this name.
    """
    folder = Path(subject).expanduser().absolute()
    if any((folder / file).is_file() for file, _ in KINDS.values()):
        return folder
    root = Path(OutputConfig().root).expanduser()
    places = {place.parent for kind, (file, _) in KINDS.items() for place in (root / kind).glob(f"*/{file}")}
    found = sorted(place for place in places if place.name == subject)
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"{subject}: {len(found)} folders have this name; give one of them, {' or '.join(map(str, found))}"
        )
    near = difflib.get_close_matches(subject, sorted({place.name for place in places}), n=1)
    if folder.is_dir():
        files = ", ".join(file for file, _ in KINDS.values())
        raise ConfigError(f"{subject} holds none of {files}; give the folder of a study, a run or a comparison")
    if "://" in subject:
        raise ConfigError(f"{subject}: a report reads local folders; copy the run here first")
    hint = f"did you mean {near[0]!r}?" if near else f"expected a folder, or a name in {root}/{', '.join(KINDS)}"
    raise ConfigError(f"{subject}: no such study, run or comparison; {hint}")


def _write(page: Page, output: Path) -> Path:
    text = render(page)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RankloomError(f"--output {output}: can't be written: {error}; choose another file") from None
    return output
