"""Quotas: what each key has left of its minute, and its share of the requests in flight."""

from __future__ import annotations

from collections import Counter

from rankloom.errors import OverloadedError
from rankloom.gateway.errors import RateLimitedError
from rankloom.gateway.keys import Key, TokenBucket


class Quotas:
    """The quotas of one endpoint. `now` is in seconds of a monotonic clock."""

    def __init__(self) -> None:
        self.in_flight = 0
        """Requests in flight, with any key or none."""
        self._of_key = Counter[str]()
        self._meters: dict[tuple[str, str], TokenBucket] = {}

    def admit(self, key: Key | None, now: float) -> None:
        """Count a request against its key. Raises RateLimitedError where the key has used up its minute."""
        if key is None:
            return
        for resource, per_minute in (("requests", key.requests_per_minute), ("tokens", key.tokens_per_minute)):
            if per_minute is None:
                continue
            wait_s = self._get_meter(key, resource, per_minute).wait_s(now)
            if wait_s > 0:
                text = f"Rate limit of {per_minute} {resource} a minute reached; try again in"
                raise _make_rate_error(resource, text, wait_s)
        if key.requests_per_minute is not None:
            self._get_meter(key, "requests", key.requests_per_minute).take(1, now)

    def check_room(self, key: Key | None, most: int) -> None:
        """Check that one more of at most `most` requests may be in flight.

        A key may have as many as are left free for others: half of all if it is alone, a third where two keys send
        all they can. So no key can keep the next one out.

        Raises:
            OverloadedError: the endpoint is full. RateLimitedError: this key has its share.
        """
        free = most - self.in_flight
        if free <= 0:
            raise OverloadedError(f"{self.in_flight} requests are in flight; try again later.")
        mine = self._of_key[key.id] if key else 0
        if mine >= free:
            raise _make_rate_error("requests", f"This key has {mine} requests in flight, its share; try again in", 1.0)

    def begin(self, key: Key | None, tokens: int, now: float) -> None:
        """Begin a request that may generate `tokens` tokens, which are taken off the key's minute until it ends."""
        self.in_flight += 1
        if key is not None:
            self._of_key[key.id] += 1
            if key.tokens_per_minute is not None:
                self._get_meter(key, "tokens", key.tokens_per_minute).take(
                    _count_reserved(key.tokens_per_minute, tokens), now
                )

    def end(self, key: Key | None, tokens: int, used: int, now: float) -> None:
        """End a request that `used` this many tokens, the prompt's included. `tokens` as in `begin`."""
        self.in_flight -= 1
        if key is not None:
            self._of_key[key.id] -= 1
            if key.tokens_per_minute is not None:
                over = used - _count_reserved(key.tokens_per_minute, tokens)
                self._get_meter(key, "tokens", key.tokens_per_minute).take(over, now)

    def _get_meter(self, key: Key, resource: str, per_minute: int) -> TokenBucket:
        return self._meters.setdefault((key.id, resource), TokenBucket(per_minute))


def _count_reserved(per_minute: int, tokens: int) -> int:
    """Return the tokens to reserve: at most a minute's, so that a long request is not refused for its length."""
    return min(per_minute, tokens)


def _make_rate_error(resource: str, message: str, wait_s: float) -> RateLimitedError:
    return RateLimitedError(f"{message} {wait_s:.1f} s.", resource, wait_s)
