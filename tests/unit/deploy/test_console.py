"""The console in headless Chromium, by keyboard; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from endpoint import Endpoint, endpoint
from rankloom.gateway.keys import KeyFile

pytest.importorskip("websockets.sync.client")
from browser import CHROMIUM, Page, browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def own(made: Endpoint, page: Page) -> bool:
    """Whether the page asked nobody but its endpoint."""
    return all(url.startswith((made.url, "data:", "about:")) for url in page.requests)


def test_two_adapters_answer_side_by_side_by_keyboard(tmp_path: Path) -> None:
    with endpoint(tmp_path) as made, browser(f"{made.url}/", tmp_path) as page:
        page.until("document.querySelectorAll('input[name=model]').length == 3")
        assert page.value("[...document.querySelectorAll('#cards h3')].map(e => e.textContent).join()") == "bank,faq"
        page.value("document.querySelector('input[name=model]').focus()")
        page.press("Tab", 9)
        page.press("Tab", 9)
        page.press(" ", 32)  # faq, the third
        assert page.value("document.querySelectorAll('input[name=model]:checked').length") == 3
        for _ in range(2):  # past the system prompt
            page.press("Tab", 9)
        assert page.value("document.activeElement.id") == "prompt"
        page.type("which <b>card</b>?")
        page.press("Enter", 13, modifiers=2)
        page.until("document.querySelectorAll('#answers article').length == 3")
        page.until("[...document.querySelectorAll('#answers p')].every(e => e.textContent.includes('tokens, first'))")
        answers = page.value("[...document.querySelectorAll('#answers pre')].map(e => e.textContent).join('\\n')")
        assert answers.split("\n") == [f"{each}|user=which <b>card</b>?;|" for each in ("base", "bank@1", "faq@1")]
        assert page.value("document.querySelectorAll('#answers b').length") == 0  # text stays text
        page.until("document.getElementById('answered').textContent == '3'")
        page.screenshot(tmp_path / "console.png")
        assert own(made, page)
        assert page.errors == []


def test_a_stream_is_stopped_and_a_failure_is_told(tmp_path: Path) -> None:
    with endpoint(tmp_path, broken=["faq@1"]) as made, browser(f"{made.url}/", tmp_path) as page:
        page.until("document.querySelectorAll('input[name=model]').length == 3")
        page.value("document.querySelectorAll('input[name=model]')[2].click()")
        page.value("document.getElementById('prompt').focus()")
        page.type("forever")
        page.press("Enter", 13, modifiers=2)
        page.until("document.querySelector('.failed pre')?.textContent.includes('faq@1 does nothing')")
        page.until("document.querySelector('#answers pre').textContent.length > 5")
        page.value("document.getElementById('stop').click()")
        page.until("document.querySelector('#answers p').textContent == 'stopped'")
        made.settled()


def test_a_key_is_asked_for(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key, _ = file.create("ann")
    with endpoint(tmp_path, auth={"keys": str(file.path)}) as made, browser(f"{made.url}/", tmp_path) as page:
        page.until("document.getElementById('key').checkVisibility()")
        page.value("document.getElementById('key').focus()")
        page.type(key)
        page.press("Enter", 13)
        page.until("document.querySelectorAll('input[name=model]').length == 3")
        assert not page.value("document.getElementById('key').checkVisibility()")
