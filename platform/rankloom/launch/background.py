"""A call in a background thread, and the events that its workers send meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from rankloom.events import OnEvent

TAKE_EVERY_S = 0.2


class Background:
    """A call in a daemon thread, because Ray Train would replace SIGINT's handler in the main thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._value = call()
            except BaseException as error:  # raised to `result`'s caller
                self._error = error

        self._thread = threading.Thread(target=run, name="rankloom-fit", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s`; return True once the call has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


def watch(call: Background, channel: Any, tell: OnEvent, stop: threading.Event | None = None) -> None:
    """Pass the channel's events to `tell` until the call has ended."""
    import ray

    ended = False
    while not ended:
        ended = call.join(TAKE_EVERY_S)
        for event in ray.get(channel.take.remote(stop is not None and stop.is_set())):
            tell(event)
