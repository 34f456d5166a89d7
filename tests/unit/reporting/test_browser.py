"""A report in headless Chromium: light, dark, narrow, wide, printed, by keyboard, without a network."""

from __future__ import annotations

import base64
import time
from pathlib import Path

import pytest

from made_study import make_study
from rankloom.reporting.write import report

pytest.importorskip("websockets.sync.client")
from browser import CHROMIUM, Page, browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "studies" / "made"
    make_study(folder, num_trials=64)
    return report(folder)


def open_page(page: Page, file: Path) -> None:
    page.send("Page.navigate", url=file.as_uri())
    page.until("document.documentElement.dataset.drawn")


def show(page: Page, width: int, scheme: str) -> None:
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page.send("Emulation.setDeviceMetricsOverride", **size)
    page.until(f"innerWidth === {width} && matchMedia('(prefers-color-scheme: {scheme})').matches")


def test_all_charts_are_drawn_and_no_request_leaves_the_page(file: Path, tmp_path: Path) -> None:
    assert file.stat().st_size < 5e6
    with browser("about:blank", tmp_path) as page:
        open_page(page, file)
        charts = page.value("document.querySelectorAll('.plot').length")
        assert charts > 8
        assert page.value("+document.documentElement.dataset.drawn") == charts
        assert page.value("document.querySelectorAll('.plot svg.marks').length") == charts
        page.value("fetch('https://example.org/').catch(() => document.body.dataset.refused = 'yes'); 1")
        page.until("document.body.dataset.refused")
        assert [url for url in page.requests if not url.startswith(("file:", "data:", "about:"))] == []
        # the policy reports what it refused just now, and nothing else went wrong
        assert [each for each in page.errors if "example.org" not in str(each)] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_any_width_and_its_texts_can_be_read(file: Path, tmp_path: Path, scheme: str) -> None:
    with browser("about:blank", tmp_path) as page:
        open_page(page, file)
        for width in (360, 768, 1280, 1920):
            show(page, width, scheme)
            assert page.value("document.documentElement.scrollWidth <= innerWidth"), width
            time.sleep(0.3)  # charts follow the width in the next frame
            assert page.value("Math.max(...[...document.querySelectorAll('.plot')].map(e => e.scrollWidth))") <= width
        paper = page.value("getComputedStyle(document.body).backgroundColor")
        inks = page.value(
            "[...new Set([...document.querySelectorAll('.plot text')].map(e => getComputedStyle(e).fill))]"
        )
        assert len(inks) == 1
        for ink in [*inks, page.value("getComputedStyle(document.querySelector('.subject')).color")]:
            assert contrast_of(ink, paper) >= 4.5, (ink, paper)


def test_a_trial_is_chosen_and_columns_are_sorted_by_keyboard(file: Path, tmp_path: Path) -> None:
    with browser("about:blank", tmp_path) as page:
        open_page(page, file)
        page.press("Tab", 9)
        assert page.value("document.activeElement.className") == "skip"
        page.value("document.querySelector('#leaderboard .choose').focus()")
        page.press("Enter", 13)
        name = page.value("document.querySelector('#leaderboard tbody tr').dataset.mark")
        assert page.value("document.querySelector('#chosen b').textContent") == name
        faded = (
            "[...document.querySelectorAll('#chart-curves-loss path')].filter(e => +getComputedStyle(e).opacity < 0.1 "
        )
        page.until(f"{faded}|| e.getAttribute('opacity') < 0.1).length > 60")
        page.press("Escape", 27)
        page.until("document.getElementById('chosen').hidden")

        steps = "[...document.querySelectorAll('#leaderboard tbody tr')].map(e => +e.cells[6].dataset.value)"
        page.value("document.querySelectorAll('#leaderboard .sort')[6].focus()")
        page.press("Enter", 13)
        assert page.value(steps) == sorted(page.value(steps))
        page.press("Enter", 13)
        assert page.value(steps) == sorted(page.value(steps), reverse=True)
        assert page.value("document.querySelectorAll('#leaderboard th')[6].getAttribute('aria-sort')") == "descending"


def test_it_prints(file: Path, tmp_path: Path) -> None:
    with browser("about:blank", tmp_path) as page:
        open_page(page, file)
        show(page, 1280, "dark")
        page.send("Emulation.setEmulatedMedia", media="print")
        assert page.value("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert len(base64.b64decode(page.send("Page.printToPDF")["data"])) > 50_000


def contrast_of(one: str, other: str) -> float:
    """The contrast of two rgb() colours, as WCAG defines it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)
