"""Errors of the gateway itself; `openai/errors.py` maps them to what a client receives."""

from __future__ import annotations

from rankloom.errors import RankloomError


class RateLimitedError(RankloomError):
    """A key has used up its share."""

    def __init__(self, message: str, resource: str = "requests", retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.resource = resource
        """What is used up: `requests` or `tokens`."""
        self.retry_after_s = retry_after_s
        """Seconds after which a retry makes sense."""


class NameTakenError(RankloomError):
    """A name that already has a meaning can't be given to an adapter."""


class NotLoadedError(RankloomError):
    """No adapter was loaded under this name at run time."""
