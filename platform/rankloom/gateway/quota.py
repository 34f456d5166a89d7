"""Quota: what each key has left of its minute, and its share of the requests under way."""

from __future__ import annotations

from collections import Counter

from rankloom.errors import OverloadedError
from rankloom.gateway.keys import Key, TokenBucket
from rankloom.gateway.openai.requests import WireError


class Quotas:
    """Those of one endpoint. Times are of a clock that does not go back, in seconds."""

    def __init__(self) -> None:
        self.in_flight = 0
        """Requests under way, of all keys and of none."""
        self._of_key = Counter[str]()
        self._meters: dict[tuple[str, str], TokenBucket] = {}

    def admit(self, key: Key | None, now: float) -> None:
        """Count a request against its key. Raises WireError 429 where it has used up its minute."""
        if key is None:
            return
        for what, per_minute in (("requests", key.requests_per_minute), ("tokens", key.tokens_per_minute)):
            if per_minute is None:
                continue
            wait_s = self._meter(key, what, per_minute).wait_s(now)
            if wait_s > 0:
                raise _too_many(what, f"Rate limit of {per_minute} {what} a minute reached; try again in", wait_s)
        if key.requests_per_minute is not None:
            self._meter(key, "requests", key.requests_per_minute).take(1, now)

    def check_room(self, key: Key | None, most: int) -> None:
        """Whether one more of `most` requests may be under way.

        A key may have as many as are left free for others: half of all if it is alone, a third where two ask for all
        they can get. So none can keep the next one out.

        Raises:
            OverloadedError: nobody may have one more. WireError 429: this key may not.
        """
        free = most - self.in_flight
        if free <= 0:
            raise OverloadedError(f"{self.in_flight} requests are under way; try again later.")
        mine = self._of_key[key.id] if key else 0
        if mine >= free:
            raise _too_many("requests", f"This key has {mine} requests under way, its share; try again in", 1.0)

    def begin(self, key: Key | None, tokens: int, now: float) -> None:
        """A request begins, which may generate so many tokens: they are taken off the key's minute until it ends."""
        self.in_flight += 1
        if key is not None:
            self._of_key[key.id] += 1
            if key.tokens_per_minute is not None:
                self._meter(key, "tokens", key.tokens_per_minute).take(_reserved(key.tokens_per_minute, tokens), now)

    def end(self, key: Key | None, tokens: int, used: int, now: float) -> None:
        """It has ended, and used so many, the prompt's included. `tokens` as in `begin`."""
        self.in_flight -= 1
        if key is not None:
            self._of_key[key.id] -= 1
            if key.tokens_per_minute is not None:
                over = used - _reserved(key.tokens_per_minute, tokens)
                self._meter(key, "tokens", key.tokens_per_minute).take(over, now)

    def _meter(self, key: Key, what: str, per_minute: int) -> TokenBucket:
        return self._meters.setdefault((key.id, what), TokenBucket(per_minute))


def _reserved(per_minute: int, tokens: int) -> int:
    """No more than a minute has, so that a long request need not ask for less than it may get."""
    return min(per_minute, tokens)


def _too_many(what: str, message: str, wait_s: float) -> WireError:
    return WireError(429, f"{message} {wait_s:.1f} s.", code="rate_limit_exceeded", kind=what, retry_after_s=wait_s)
