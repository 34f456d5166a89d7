"""LoadBackoff: which versions could not be loaded, and why, so that an engine does not retry them at every request."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from rankloom.errors import RankloomError

FIRST_S, LONGEST_S = 1.0, 300.0
"""For how long the first refusal of a version holds, and any later one."""
MOST = 4096
"""Versions that are remembered; beyond it the oldest are forgotten."""


@dataclass(frozen=True)
class _Refusal:
    kind: type[RankloomError]
    message: str
    until: float
    held_s: float


class LoadBackoff:
    """A version never changes, so most are refused for good. But a store may only have been away: so a version is tried
    again, each time after twice as long.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[str, _Refusal] = OrderedDict()

    def add(self, ref: str, error: RankloomError, now: float) -> None:
        """Remember that a version could not be loaded.

        Args:
            now: in seconds of a monotonic clock.
        """
        before = self._of.pop(ref, None)
        held_s = min(LONGEST_S, 2 * before.held_s) if before else FIRST_S
        self._of[ref] = _Refusal(type(error), str(error), now + held_s, held_s)
        if len(self._of) > MOST:
            self._of.popitem(last=False)

    def clear(self, ref: str) -> None:
        """Forget a version's failures: it was loaded."""
        self._of.pop(ref, None)

    def get(self, ref: str, now: float) -> RankloomError | None:
        """Return the error to raise, a new one each time (a reused one keeps all tracebacks); None: try to load it."""
        refusal = self._of.get(ref)
        return None if refusal is None or now >= refusal.until else refusal.kind(refusal.message)
