"""Trials in one process: each one's calls in order, one beside the other, and what is stopped is forgotten."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from rankloom.search.shared_actor import TERMINATE, SharedTrialActor


class Trial:
    def __init__(self, name: str) -> None:
        if name == "broken":
            raise ValueError(name)
        self.done: list[str] = []
        self.threads: set[int] = set()

    def note(self, what: str, seconds: float = 0.0) -> list[str]:
        time.sleep(seconds)
        self.threads.add(threading.get_ident())
        self.done.append(what)
        return self.done

    def meet(self, barrier: threading.Barrier) -> None:
        barrier.wait(timeout=10)

    def count_threads(self) -> int:
        return len(self.threads)

    def stop(self) -> None:
        self.done.append("stopped")


def call(stage: SharedTrialActor, key: str, method: str, *arguments: Any) -> Any:
    return stage.call(key, method, arguments, {})


def test_calls_of_a_trial_come_one_after_the_other_in_one_thread() -> None:
    async def main() -> None:
        stage = SharedTrialActor()
        await stage.start("a", Trial, {"name": "a"})
        slow, quick = call(stage, "a", "note", "first", 0.2), call(stage, "a", "note", "second")
        await asyncio.gather(slow, quick)
        assert await call(stage, "a", "note", "third") == ["first", "second", "third"]
        assert await call(stage, "a", "count_threads") == 1

    asyncio.run(main())


def test_trials_do_not_wait_for_one_another() -> None:
    async def main() -> None:
        stage, barrier = SharedTrialActor(), threading.Barrier(2)
        for key in "ab":
            await stage.start(key, Trial, {"name": key})
        await asyncio.gather(*(call(stage, key, "meet", barrier) for key in "ab"))

    asyncio.run(main())


@pytest.mark.parametrize("end", ["stop", TERMINATE])
def test_what_has_ended_or_never_began_is_unknown(end: str) -> None:
    async def main() -> None:
        stage = SharedTrialActor()
        await stage.start("a", Trial, {"name": "a"})
        await call(stage, "a", end)
        with pytest.raises(KeyError):
            await call(stage, "a", "note", "late")
        with pytest.raises(ValueError, match="broken"):
            await stage.start("b", Trial, {"name": "broken"})
        with pytest.raises(KeyError):
            await call(stage, "b", "note", "never")

    asyncio.run(main())
