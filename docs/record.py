"""Record a real study as docs/assets/tune.svg, and the console of an endpoint as docs/assets/console.png.

    python docs/record.py tune FOLDER       # the quickstart at a smaller size; its files go to FOLDER
    python docs/record.py console URL       # of an endpoint that runs, and has a canary:

        rankloom adapters publish FOLDER/registry/bank-intents-lora/1 --name bank-intents --registry FOLDER/registry
        rankloom adapters promote bank-intents@1 --registry FOLDER/registry
        rankloom adapters promote bank-intents@2 --registry FOLDER/registry --alias canary
        rankloom serve shipped:serve/quickstart.yaml registry=FOLDER/registry routes.cards.canary.adapter=bank-intents

The SVG plays what `rankloom tune` shows on a terminal, sped up. The picture needs Chromium and websockets.
"""

from __future__ import annotations

import re
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

import rankloom as rl
from rankloom.cli.study_view import build_result_rows, build_status_table, format_result, format_study_event
from rankloom.events import Event, StudyStatus

REPO = Path(__file__).resolve().parents[1]
ASSETS = REPO / "docs" / "assets"
COMMAND = [
    "shipped:studies/quickstart.yaml", "search.num_trials=4", "trial.budget.steps=16", "trial.eval.every=4",
    "trial.eval.max_test_rows=56",
]  # fmt: skip
WIDTH, MOST_FRAMES, FRAME_S, LAST_S = 104, 28, 0.6, 8.0
QUESTION = "How can I unblock my card?\n"
FORMAT = re.sub(r"@font-face \{\{.*?\n    \}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""Rich's own without its fonts, which come from another server."""

sys.path.insert(0, str(REPO / "tests" / "support"))


class Recording:
    """What the terminal showed, frame by frame: the lines so far, and below them the live table."""

    def __init__(self) -> None:
        self._lines: list[RenderableType] = [Text(f"$ rankloom tune {' '.join(COMMAND)}", style="bold")]
        self._frames: list[list[RenderableType]] = [[*self._lines]]

    def show(self, event: Event) -> None:
        """Take an event in, as `rankloom tune` does."""
        self._lines += [Text(line) for line in format_study_event(event)]
        live = [build_status_table(event)] if isinstance(event, StudyStatus) else []
        if live or format_study_event(event):
            self._frames.append([*self._lines, *live])

    def end(self, result: rl.StudyResult) -> None:
        """Show the last table and the lines after it."""
        header, *rows = build_result_rows(result)
        shown = Table(*header, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            shown.add_row(*map(Text, row))
        ending = [Text(line) for line in format_result(result, COMMAND[0], COMMAND[1:])]
        self._frames.append([*self._lines, Text(), shown, Text(), *ending])

    def svg(self) -> str:
        """Return the animation; a viewer that shows none shows the last frame."""
        *some, last = self._frames
        frames = [*some[:: max(1, -(-len(some) // MOST_FRAMES))], last]
        height = max(len(_printed(frame).splitlines()) for frame in frames)
        total = FRAME_S * (len(frames) - 1) + LAST_S
        styles, pictures = [], []
        for number, frame in enumerate(frames):
            begin, end = 100 * number * FRAME_S / total, 100 * (number + 1) * FRAME_S / total
            end = 100.0 if number == len(frames) - 1 else end
            hidden = "visible" if number == len(frames) - 1 else "hidden"
            keys = f"0%{{visibility:hidden}}{begin:.2f}%{{visibility:visible}}{end:.2f}%{{visibility:hidden}}"
            styles.append(f"@keyframes k{number}{{{keys}}}")
            styles.append(f"#f{number}{{visibility:{hidden};animation:k{number} {total:.1f}s step-end infinite}}")
            pictures.append(f'<g id="f{number}">{_svg(frame, height, f"r{number}")}</g>')
        box = re.search(r'viewBox="([^"]+)"', pictures[-1])
        assert box is not None
        still = "@media (prefers-reduced-motion){g{animation:none!important}}"
        style = f"<style>{''.join(styles)}{still}</style>"
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box[1]}" role="img" aria-label="rankloom tune">'
        return f"{head}{style}{''.join(pictures)}</svg>\n"


def _printed(frame: list[RenderableType]) -> str:
    console = Console(width=WIDTH, file=StringIO())
    console.print(*frame, sep="\n")
    return console.file.getvalue()  # type: ignore[attr-defined]


def _svg(frame: list[RenderableType], height: int, name: str) -> str:
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    console.print(*frame, *[""] * (height - len(_printed(frame).splitlines())), sep="\n")
    return console.export_svg(title="rankloom tune", code_format=FORMAT, unique_id=name)


def picture_console(url: str) -> None:
    """Ask the console's first two models, the base and a route, and take its picture."""
    from browser import browser  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as scratch, browser(url, Path(scratch)) as page:
        page.send("Emulation.setDeviceMetricsOverride", width=1280, height=1280, deviceScaleFactor=1, mobile=False)
        page.until("document.querySelectorAll('input[name=model]:checked').length == 2")
        page.value("document.getElementById('max-tokens').value = 16")
        page.value("document.getElementById('prompt').focus()")
        page.type(QUESTION)
        page.press("Enter", 13, modifiers=2)
        page.until("document.querySelectorAll('#answers article').length == 2")
        page.until("[...document.querySelectorAll('#answers p')].every(e => e.textContent.includes('tokens, first'))")
        page.screenshot(ASSETS / "console.png")


def record_study(folder: str) -> None:
    """Search, and write down what the terminal shows."""
    root = Path(folder).resolve()
    recording = Recording()
    study = rl.load(rl.StudyConfig, COMMAND[0], [*COMMAND[1:], f"trial.output.root={root}"])
    recording.end(rl.tune(study, on_event=recording.show))
    svg = recording.svg().replace(f"{root}/", "~/rankloom/")
    svg = re.sub(r' textLength="[\d.]+"(?=[^>]*>[^<]*~/rankloom)', "", svg)  # those lines are shorter now
    (ASSETS / "tune.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    {"tune": record_study, "console": picture_console}[sys.argv[1]](sys.argv[2])
