"""The worst request that an endpoint lets through holds up nobody on its replica: streams and the event loop go on."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import rankloom.engine.guide
from rankloom.engine.engine import ServingEngine
from rankloom.engine.jobs import CompletionJob, run
from rankloom.engine.protocol import ChatPrompt, Grammar, Request, Sampling
from rankloom.errors import RequestError
from served import GREEDY, engine_on, serving

MOST_S = 0.1
"""The longest that others may wait, beyond what they wait on this machine while nothing happens."""
TRIES = 10
"""What else runs on the machine only ever adds to a wait: the least counts."""
CHOICES = [f"{number:03}" + "where is the parcel " * 13 for number in range(250)]  # 65,536 characters
STOPS = tuple("a" * 254 + f"{number:02}" for number in range(16))
HEX = os.urandom(2**20).hex()[: 2 * 2**20 - 200]
PARTS = {str(i): {"type": "string", "maxLength": i} for i in range(20)}
NAMES = [f"a long name {i}" for i in range(80)]
LARGE = {"type": "object", "properties": {name: {"type": "object", "properties": PARTS} for name in NAMES}}
COMPLEX = "start: b\nb: b b | c\nc: c c | d\nd: d d | /[a-z ]/\n"


def follow(kind: Any, text: str) -> Sampling:
    return Sampling(grammar=Grammar(kind=kind, text=text))


def talk(*messages: tuple[str, str]) -> ChatPrompt:
    return ChatPrompt(tuple({"role": role, "content": content} for role, content in messages))


WORST = {
    "words": CompletionJob("w", None, ("where is the parcel " * (2**20 // 10),), Sampling()),
    "one word": CompletionJob("w", None, (HEX,), Sampling()),
    "special tokens": CompletionJob("w", None, (talk(("user", "<|end|>" * 290_000)),), Sampling()),
    "messages": CompletionJob(
        "w", None, (talk(*[("user", "a"), ("assistant", "b")] * 30_000, ("user", "a")),), Sampling()
    ),
    "choices": CompletionJob("w", None, ("hi",), Sampling(choices=tuple(CHOICES)), n=16, max_tokens=300),
    "choices with logprobs": CompletionJob(
        "w", None, ("hi",), Sampling(choices=tuple(CHOICES), logprobs=20), n=16, max_tokens=9
    ),
    "choices that are no whole character": CompletionJob(
        "w",
        None,
        ("hi",),
        Sampling(choices=("\ufffd" * 2000, "a" + "\ufffd" * 1999), logprobs=20),
        n=16,
        max_tokens=300,
    ),
    "a large schema": CompletionJob(
        "w",
        None,
        ("hi",),
        follow("json", json.dumps(LARGE | {"required": NAMES})),
        n=16,
        max_tokens=60,
    ),
    "a grammar with ever more readings": CompletionJob(
        "w", None, ("hi",), follow("grammar", "start: s\ns: a | s a | a s\na: /[a-z]/\n"), n=16, max_tokens=200
    ),
    "a grammar that is too complex": CompletionJob(
        "w",
        None,
        ("hi",),
        follow("grammar", COMPLEX),
        n=16,
        max_tokens=60,
    ),
    "a long expression": CompletionJob(
        "w", None, ("hi",), follow("regex", ".*(a|b|c|d).{15}x.*(e|f).{12}"), n=16, max_tokens=200
    ),
    "stops": CompletionJob("w", None, ("hi",), Sampling(stop=STOPS, ignore_eos=True), n=16, max_tokens=40),
}


class Others:
    """Another client's stream and whatever else the event loop does, and how long they waited since that was asked."""

    def __init__(self, engine: ServingEngine) -> None:
        self._waited = 0.0
        self._tasks = [asyncio.create_task(self._read(engine)), asyncio.create_task(self._beat())]

    def waited(self) -> float:
        waited, self._waited = self._waited, 0.0
        return waited

    def end(self) -> None:
        for task in self._tasks:
            assert not task.done()
            task.cancel()

    async def _read(self, engine: ServingEngine) -> None:
        endless = GREEDY.model_copy(update={"max_tokens": 400})
        for number in itertools.count():
            last = time.monotonic()
            async for _ in engine.generate(Request(f"other-{number}", None, (5, 6, 7), endless)):
                now = time.monotonic()
                self._waited, last = max(self._waited, now - last), now

    async def _beat(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.005)
            self._waited = max(self._waited, time.monotonic() - began)


async def others_wait(engine: ServingEngine, work: Callable[[], Awaitable[object]]) -> float:
    others = Others(engine)
    await asyncio.sleep(0.3)
    least = float("inf")
    for _ in range(TRIES):
        others.waited()
        await asyncio.sleep(0.3)
        idle = others.waited()
        await work()
        least = min(least, others.waited() - idle)
        if least < MOST_S:
            break
    others.end()
    return least


@pytest.mark.parametrize("name", list(WORST))
def test_the_worst_work_holds_up_no_other(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    # Places for others beside its 16 sequences: to wait for a place is to queue, which no step can shorten.
    engine = engine_on(tiny_llama, tmp_path, kv_cache_tokens=2**16, max_num_seqs=32)

    async def ask() -> None:
        with suppress(RequestError):  # too long, which is known once it is read
            async for _ in run(engine, WORST[name]):
                pass

    assert serving(engine, lambda: others_wait(engine, ask), limit_s=240) < MOST_S


def test_choices_are_made_a_tree_once_for_all_completions(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, made, grow = engine_on(tiny_llama, tmp_path), [], rankloom.engine.guide.build_choice_tree
    monkeypatch.setattr(rankloom.engine.guide, "build_choice_tree", lambda *given: made.append(1) or grow(*given))

    async def ask() -> None:
        for choices in (("card", "transfer"), tuple(CHOICES)):
            made.clear()
            async for _ in run(
                engine, CompletionJob("w", None, ("hi", "ho"), Sampling(choices=choices), n=4, max_tokens=3)
            ):
                pass
            assert made == [1]
        assert not engine._guides._making
        assert len(engine._guides._made) <= 1

    serving(engine, ask)


def test_choices_that_are_refused_after_their_client_has_gone_are_not_logged(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ended = engine_on(tiny_llama, tmp_path), asyncio.Event()

    def refused(*_: object) -> None:
        time.sleep(0.2)
        raise RequestError("choices: secret")

    monkeypatch.setattr(rankloom.engine.guide, "build_choice_tree", refused)

    async def ask() -> None:
        asked = Sampling(choices=tuple(CHOICES))
        request = asyncio.create_task(anext(engine.generate(Request("r", None, (5,), asked))))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        request.cancel()
        while engine._guides._making:
            await asyncio.sleep(0.01)
        gc.collect()
        ended.set()

    serving(engine, ask)
    assert ended.is_set()
    assert "secret" not in caplog.text


def test_a_client_that_reads_late_does_not_get_all_at_once(tiny_llama: Path, tmp_path: Path) -> None:
    engine, counts = engine_on(tiny_llama, tmp_path), []

    async def ask() -> None:
        sampling = Sampling(ignore_eos=True, logprobs=20, max_tokens=40)
        async for progress in run(engine, CompletionJob("w", None, ("hi",), sampling, n=16, max_tokens=40)):
            counts.append(len(progress.deltas))
            if len(counts) == 1:
                while engine.get_stats().running:
                    await asyncio.sleep(0.01)

    serving(engine, ask)
    assert sum(counts) == 16 * 40
    assert max(counts) <= 256
