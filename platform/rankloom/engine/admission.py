"""Admission: an engine accepts valid requests, with unique ids, and not too many at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rankloom.engine.protocol import Request
from rankloom.errors import OverloadedError, RankloomError, RequestError
from rankloom.registry.store import parse_ref

AT_LEAST = 16
"""Requests that one tenant may always have while the engine has room: as many as one HTTP request makes by default."""
STOPPING = "the engine is stopping; try another replica"


class Admission:
    """The requests in flight."""

    def __init__(self, limit: int, vocabulary: int) -> None:
        self.limit, self._vocabulary = limit, vocabulary
        self.open: dict[str, str | None] = {}
        """The tenant of each, by id."""
        self.stopping = False

    @contextmanager
    def take(self, request: Request, context: int) -> Iterator[None]:
        """Hold a request's place for the duration of the context.

        Raises:
            RequestError: it can't be served here. OverloadedError: the engine is full, or its tenant has its share.
        """
        with self.hold(request.id, request.adapter, request.tenant):
            self._check_prompt(request, context)
            yield

    @contextmanager
    def hold(self, id: str, adapter: str | None, tenant: str | None) -> Iterator[None]:
        """Hold a place for a request whose prompt is not known here. Raises as `take`."""
        self.refuse_if_stopping()
        if len(self.open) >= self.limit:
            raise OverloadedError(f"{self.limit} requests are running or waiting already; try again later")
        if tenant is not None:  # no tenant takes so many that the next one gets none
            mine = sum(each == tenant for each in self.open.values())
            if mine >= max(self.limit - len(self.open), AT_LEAST):
                raise OverloadedError(f"{mine} requests of this key are running or waiting already; try again later")
        if id in self.open:
            raise RequestError(f"id: {id!r} is in use; give each request an id of its own")
        if adapter is not None:
            check_ref(adapter)
        self.open[id] = tenant
        try:
            yield
        finally:
            self.open.pop(id, None)

    def _check_prompt(self, request: Request, context: int) -> None:
        if not request.prompt:
            raise RequestError("prompt: empty; give at least one token")
        if min(request.prompt) < 0 or max(request.prompt) >= self._vocabulary:
            raise RequestError(f"prompt: a token is outside of the vocabulary of {self._vocabulary}")
        completed = request.pooling is None and request.sampling.max_tokens > 0
        if len(request.prompt) + completed > context:
            raise RequestError(
                f"prompt: {len(request.prompt)} tokens leave no room for an answer; prompt and answer together can "
                f"have {context}"
            )

    def refuse_if_stopping(self) -> None:
        if self.stopping:
            raise OverloadedError(STOPPING)


def check_ref(ref: str) -> None:
    """Raise RequestError where `ref` is not an exact version."""
    try:
        _, version = parse_ref(ref)
    except RankloomError as error:
        raise RequestError(f"adapter: {error}") from None
    if version is None or not version.isdigit():
        raise RequestError(f"adapter: {ref!r} names no exact version; give one such as {ref.split('@')[0]}@1")
