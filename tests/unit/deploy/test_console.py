"""The console in headless Chromium, by keyboard; skipped where there is none."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from endpoint import Endpoint, endpoint
from rankloom.gateway.keys import KeyFile

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
websockets = pytest.importorskip("websockets.sync.client")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


class Page:
    """A tab, driven over Chromium's own protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0
        self.requests: list[str] = []
        self.errors: list[Any] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> Any:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=20))
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(message["params"])
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def value(self, expression: str) -> Any:
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression: str) -> Any:
        deadline = time.monotonic() + 15
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, (expression, self.value("document.body.innerText"), self.errors)
            time.sleep(0.1)
        return value

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=modifiers,
                **({"text": text} if kind == "keyDown" and text and not modifiers else {}),
            )  # fmt: skip

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextmanager
def browser(url: str, tmp_path: Path) -> Iterator[Page]:
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
        "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--window-size=1280,1000", f"--user-data-dir={tmp_path / 'profile'}", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        port_file = tmp_path / "profile" / "DevToolsActivePort"
        deadline = time.monotonic() + 30
        while not port_file.is_file() or not port_file.read_text().strip():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        port = port_file.read_text().split()[0]
        tab = next(each for each in httpx2.get(f"http://127.0.0.1:{port}/json").json() if each["type"] == "page")
        with websockets.connect(tab["webSocketDebuggerUrl"], max_size=None) as socket:
            page = Page(socket)
            page.send("Page.navigate", url=url)
            yield page
    finally:
        process.terminate()
        process.wait(10)


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
