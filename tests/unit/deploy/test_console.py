"""The console in headless Chromium, by keyboard; skipped where there is none."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from chat_templates import write_base
from endpoint import Endpoint, endpoint, listening
from one_engine import OneEngine
from rankloom.config import parse
from rankloom.config.serve import ServeConfig
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.keys import KeyFile
from rankloom.registry import Registry
from served import load

pytest.importorskip("websockets.sync.client")
from browser import CHROMIUM, Page, browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


CANARY: dict[str, Any] = {
    "cards": {"canary": {"adapter": "bank", "share": 0.1}, "fallback": ["base"]},
    "mixed": {"split": {"bank@1": 3, "faq@1": 1}, "sticky": True, "shadow": {"to": "bank@2", "share": 0.5}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "pay",
        "parameters": {"type": "object", "properties": {"cents": {"enum": [5]}}, "required": ["cents"]}
        | {"additionalProperties": False},
    },
}


def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = page.value(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")
    return found


def press_on(page: Page, text: str) -> None:
    """Press Enter on the button of a text, which the keyboard can reach."""
    buttons = "[...document.querySelectorAll('main button')]"
    page.value(f"{buttons}.find(e => e.textContent == {text!r}).focus()")
    assert page.value("document.activeElement.textContent") == text
    page.press("Enter", 13)
    page.until("document.getElementById('confirm').open")


def confirm(page: Page) -> None:
    page.press("Tab", 9)
    page.until("document.activeElement.id == 'confirm-yes'")
    page.press("Enter", 13)
    page.until("!document.getElementById('confirm').open")


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
        assert not page.value("document.getElementById('notice').checkVisibility()")
        page.type("wrong")
        page.press("Enter", 13)
        page.until("document.getElementById('notice').textContent == 'Incorrect API key provided.'")
        page.value("document.getElementById('key').focus()")
        page.type(key)
        page.press("Enter", 13)
        page.until("document.querySelectorAll('input[name=model]').length == 3")
        page.until("document.getElementById('notice').hidden")
        assert not page.value("document.getElementById('key').checkVisibility()")


def test_an_admin_promotes_and_rolls_back_by_keyboard(tmp_path: Path) -> None:
    with endpoint(tmp_path, routes=CANARY) as made:
        made.registry.promote("bank@2", "canary")
        with browser(f"{made.url}/", tmp_path) as page:
            page.until("document.querySelectorAll('#routes .arm').length == 4")
            arms = texts(page, "#routes .arm > span")
            assert arms[:4] == ["bank@champion is bank@1", "90 %", "bank@canary is bank@2", "10 %"]
            assert arms[4:] == ["bank@1", "75 %", "faq@1", "25 %"]
            assert texts(page, "#routes small") == ["0 requests, 0 failed"] * 2
            assert texts(page, "#routes p") == ["canary", "falls back to base", "sticky", "50 % copied to bank@2"]
            press_on(page, "Promote bank@2")
            assert page.value("document.activeElement.id") == "confirm-no"
            assert page.value("document.getElementById('confirm-text').textContent").endswith("cards to bank@2?")
            page.press("Escape", 27)
            page.until("!document.getElementById('confirm').open")
            assert made.registry.aliases("bank")["champion"] == 1
            assert page.value("document.activeElement.textContent") == "Promote bank@2"

            press_on(page, "Promote bank@2")
            confirm(page)
            page.until("document.getElementById('notice').textContent == 'bank@champion is bank@2 now.'")
            assert made.registry.aliases("bank")["champion"] == 2
            page.until("document.querySelectorAll('#routes .arm').length == 3")
            press_on(page, "Roll back")
            confirm(page)
            page.until("document.getElementById('notice').textContent == 'bank@champion is bank@1 now.'")
            assert made.registry.aliases("bank")["champion"] == 1
            press_on(page, "Roll back")  # the canary, which has begun again
            confirm(page)
            page.until("document.getElementById('notice').textContent == 'bank@canary is bank@1 now.'")
            assert made.registry.aliases("bank") == {"champion": 1, "canary": 1}
            press_on(page, "Roll back")  # there is nothing before version 1
            confirm(page)
            page.until("document.getElementById('notice').textContent.includes('nothing to roll back to')")
            assert made.registry.aliases("bank")["champion"] == 1
            assert own(made, page)


def test_only_an_admin_sees_requests_and_moves_aliases(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    keys = {role: file.create(role, role)[0] for role in ("user", "admin")}
    with endpoint(tmp_path, routes=CANARY, auth={"keys": str(file.path)}) as made:
        made.registry.promote("bank@2", "canary")
        made.client(keys["user"]).completions.create(model="bank@1", prompt="hi")
        for role, key in keys.items():
            headers = {"authorization": f"Bearer {key}"}
            body = {"adapter": "bank", "version": 2, "alias": "beta"}
            answer = made.post("/console/promote", body, headers=headers)
            assert (answer.status_code, answer.json().get("adapter")) == ((403, None), (200, "bank@2"))[role == "admin"]
            elsewhere = headers | {"origin": "http://example.org"}
            assert made.post("/console/promote", body, headers=elsewhere).status_code == 403
            missing = made.post("/console/promote", body | {"version": 9}, headers=headers)
            assert missing.status_code == (404 if role == "admin" else 403)
            with browser(f"{made.url}/", tmp_path / role) as page:
                page.value(f"sessionStorage.setItem('rankloom-key', {key!r}); look()")
                page.until("document.querySelectorAll('#cards article').length == 2")
                assert bool(texts(page, "#cards button")) == (role == "admin")
                assert len(texts(page, "#recent tr")) == (role == "admin")
                if role == "admin":
                    _, model, by, prompt, tokens, *_, outcome = texts(page, "#recent td")
                    assert (model, by, prompt, tokens, outcome) == ("bank@1", "bank@1", "2", "10", "ok")


def test_calls_of_tools_are_shown(tmp_path: Path, tiny_llama: Path) -> None:
    base = load(write_base(tiny_llama, tmp_path / "base", "hermes"))
    replicas = OneEngine(base, Registry(tmp_path / "registry"))
    gateway = Gateway(parse(ServeConfig, {"base": base.id}), Registry(tmp_path / "registry"), replicas)
    with listening(gateway) as url, browser(f"{url}/", tmp_path) as page:
        page.until("document.querySelectorAll('input[name=model]:checked').length == 1")
        page.value(f"document.getElementById('tools').value = {json.dumps(json.dumps([TOOL]))}")
        page.value("document.getElementById('tool-choice').value = 'required'")
        page.value("document.getElementById('temperature').value = 1")
        page.value("document.getElementById('prompt').focus()")
        page.type("Pay!")
        page.press("Enter", 13, modifiers=2)
        page.until("document.querySelector('#answers p')?.textContent.includes('ended by ')")
        assert set(texts(page, ".call code")) == {"pay"}
        assert json.loads(texts(page, ".call pre")[0]) == {"cents": 5}
        page.value("document.getElementById('tools').value = '[{'")
        page.press("Enter", 13, modifiers=2)
        page.until("document.querySelector('.failed pre')?.textContent.startsWith('The tools are not JSON')")
    asyncio.run(replicas.engine.close())


CONTRAST = """(() => {
  const probe = document.body.appendChild(document.createElement("div"));
  const light = (color) => {
    probe.style.color = color;
    const rgb = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((each) => each / 255);
    const [r, g, b] = rgb.map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratios = ["CanvasText", "var(--quiet)", "var(--accent)", "var(--wrong)"].map((color) => {
    const [low, high] = [light(color), light("Canvas")].sort((one, other) => one - other);
    return (high + 0.05) / (low + 0.05);
  });
  const dark = light("Canvas") < 0.2;
  probe.remove();
  return [Math.min(...ratios), dark];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_can_be_read(tmp_path: Path, scheme: str) -> None:
    with endpoint(tmp_path, routes=CANARY) as made, browser(f"{made.url}/", tmp_path) as page:
        made.client().completions.create(model="cards", prompt="hi")
        page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.send("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        page.until("document.querySelectorAll('#recent tr').length == 1")
        assert page.value("document.documentElement.scrollWidth") <= 360
        contrast, is_dark = page.value(CONTRAST)
        assert contrast >= 4.5  # WCAG's AA
        assert is_dark == (scheme == "dark")
        assert page.errors == []
