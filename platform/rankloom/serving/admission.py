"""Which requests an engine takes: sound ones, with ids of their own, and not too many at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rankloom.errors import OverloadedError, RankloomError, RequestError
from rankloom.registry.store import parse_ref
from rankloom.serving.protocol import Request

STOPPING = "the engine is stopping; try another replica"


class Admission:
    """The requests under way."""

    def __init__(self, limit: int, vocabulary: int) -> None:
        self.limit, self._vocabulary = limit, vocabulary
        self.open: set[str] = set()
        """Their ids."""
        self.stopping = False

    @contextmanager
    def take(self, request: Request, context: int) -> Iterator[None]:
        """It is under way while this lasts.

        Raises:
            RequestError: it can't be served here. OverloadedError: nor can any other now.
        """
        self.refuse_if_stopping()
        if len(self.open) >= self.limit:
            raise OverloadedError(f"{self.limit} requests are under way or waiting already; try again later")
        if request.id in self.open:
            raise RequestError(f"id: {request.id!r} is under way already; give each request its own")
        if request.adapter is not None:
            check_ref(request.adapter)
        if not request.prompt:
            raise RequestError("prompt: empty; give at least one token")
        if min(request.prompt) < 0 or max(request.prompt) >= self._vocabulary:
            raise RequestError(f"prompt: a token is outside of the vocabulary of {self._vocabulary}")
        if len(request.prompt) >= context:
            raise RequestError(
                f"prompt: {len(request.prompt)} tokens leave no room for an answer; prompt and answer together can "
                f"have {context}"
            )
        self.open.add(request.id)
        try:
            yield
        finally:
            self.open.discard(request.id)

    def refuse_if_stopping(self) -> None:
        if self.stopping:
            raise OverloadedError(STOPPING)


def check_ref(ref: str) -> None:
    """Raises RequestError where it is no exact version."""
    try:
        _, version = parse_ref(ref)
    except RankloomError as error:
        raise RequestError(f"adapter: {error}") from None
    if version is None or not version.isdigit():
        raise RequestError(f"adapter: {ref!r} names no exact version; give one such as {ref.split('@')[0]}@1")
