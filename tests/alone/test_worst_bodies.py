"""One client's worst requests hold up no other: his stream goes on, and the endpoint says that it is there."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from worst_bodies import CHAT, worst_bodies

MOST_S = 0.1
"""The longest that others may wait, beyond what they wait on this machine while nothing happens."""
TRIES = 10
"""What else runs on the machine only ever adds to a wait: the least counts."""
SERVER = """
import itertools
import sys
import threading
import time
from pathlib import Path
from typing import get_args
import endpoint
from rankloom.gateway.metrics import MAX_ADAPTERS, Outcome, Traffic
from rankloom.gateway.policy import AdapterVersions, Catalogue
from rankloom.engine.jobs import ContextError

class Far(endpoint.Replicas):
    "Another process reads the prompts."
    async def run(self, work):
        if any(not isinstance(prompt, str) or len(prompt) > 200 for prompt in work.prompts):
            raise ContextError("This model's maximum context length is less.")
        async for progress in super().run(work):
            yield progress

endpoint.Replicas = Far
with endpoint.endpoint(Path(sys.argv[1]), refresh_s=600) as made:
    names = ["bank", *(f"adapter-{number}" for number in range(MANY))]
    tokens = {"prompt": 1, "cached": 1, "completion": 1}
    for number, traffic, outcome in itertools.product(range(MAX_ADAPTERS), get_args(Traffic), get_args(Outcome)):
        name = f"adapter-{number}@1"
        made.gateway.metrics.count_request(name, traffic, outcome, tokens=tokens, first_s=0.1, token_s=0.1)
    threading.Thread(target=sys.stdin.read, daemon=True, name="told to end").start()
    print(made.url, flush=True)
    while any(thread.name == "told to end" for thread in threading.enumerate()):
        versions = {name: AdapterVersions((1,)) for name in names}
        made.gateway.catalogue = Catalogue("org/base", versions, offered=tuple(names))
        time.sleep(0.2)
""".replace("MANY", "5000")
UNKNOWN = b'{"model":"adapter-43210","prompt":"hi"}'


class Others:
    """A client with a stream and one that asks for /healthz, and how long they waited since that was last asked."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._waited = 0.0
        self.answers = [0, 0]
        self.over = False
        for work in (self._ask, self._read):
            threading.Thread(target=work, daemon=True).start()

    def waited(self) -> float:
        waited, self._waited = self._waited, 0.0
        return waited

    def _count(self, of: int, since: float) -> float:
        now = time.monotonic()
        self._waited = max(self._waited, now - since)
        self.answers[of] += 1
        return now

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=120)
        while not self.over:
            began = time.monotonic()
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            self._count(0, began)
            time.sleep(0.005)

    def _read(self) -> None:
        body = {"model": "bank", "prompt": "forever", "stream": True, "max_tokens": 200}
        connection = http.client.HTTPConnection(self._address, timeout=120)
        while not self.over:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            stream, last = connection.getresponse(), time.monotonic()
            while stream.readline():
                last = self._count(1, last)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a real server, in a process of its own."""
    command = [sys.executable, "-c", SERVER, str(tmp_path_factory.mktemp("worst"))]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1] / "support", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin
        assert server.stdout
        yield server.stdout.readline().strip().removeprefix("http://")
        server.stdin.close()
        server.wait(30)


def send(address: str, path: str, body: bytes) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, timeout=120)
    connection.request("POST" if body else "GET", path, body, {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def requests() -> Iterator[tuple[str, str, bytes]]:
    yield from worst_bodies()
    much = {"model": "bank", "n": 16, "max_tokens": 150, "logprobs": True, "top_logprobs": 20}
    yield "many likelihoods", CHAT, json.dumps(much | {"messages": [{"role": "user", "content": "a" * 90}]}).encode()
    yield "metrics", "/metrics", b""
    yield "models", "/v1/models", b""
    yield "console", "/console/state", b""
    yield "an unknown model", "/v1/completions", UNKNOWN


def test_no_request_holds_up_others(address: str) -> None:
    others = Others(address)
    time.sleep(1)
    others.waited()
    for name, path, body in requests():
        least = float("inf")
        for _ in range(TRIES):
            time.sleep(0.05)
            idle = min(MOST_S, others.waited())
            status, text = send(address, path, body)
            time.sleep(0.02)
            least = min(least, others.waited() - idle)
            assert status in (200, 400, 404), (name, text)
            assert status == 200 or len(json.loads(text)["error"]["message"]) < 300, name
            if least < MOST_S or least > 30 * MOST_S:
                break
        assert least < MOST_S, name
    others.over = True
    assert min(others.answers) > 100  # they were there
