"""The canaries of an endpoint: each side's record since its candidate appeared, and the decision that follows.

The registry holds a canary's state, as two aliases. This module holds the counts, and the candidates that were rolled
back before the registry shows it.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rankloom.config.serve import CanaryConfig, RouteConfig
from rankloom.gateway.policy import (
    MOST_TIMES,
    AdapterVersions,
    CanaryCounts,
    Catalogue,
    Decision,
    Target,
    find_canary_arms,
    judge,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CanaryEnd:
    """The end of a canary: an alias to move to a version."""

    ref: str
    alias: str


@dataclass
class _Side:
    requests: int = 0
    errors: int = 0
    token_s: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_TIMES))

    def tally(self) -> CanaryCounts:
        return CanaryCounts(self.requests, self.errors, tuple(self.token_s))


@dataclass
class _RouteCanary:
    """One route's canary. Its counts restart when a version changes."""

    config: CanaryConfig
    arms: tuple[Target | None, Target | None] = (None, None)
    stable: _Side = field(default_factory=_Side)
    candidate: _Side = field(default_factory=_Side)
    judged: bool = False


class Canaries:
    """Follows the canary of every route that has one: who is compared, and what each side has done."""

    def __init__(self, routes: Mapping[str, RouteConfig]) -> None:
        self.routes = routes
        self._by_route = {name: _RouteCanary(route.canary) for name, route in routes.items() if route.canary}
        self._rolled_back: set[Target] = set()

    def follow(self, read: Catalogue) -> Catalogue:
        """Return the catalogue as read, without the candidates that were rolled back here.

        Even where the registry is slow or not writable, their canary is over for this endpoint.
        """
        seen = {name: find_canary_arms(canary.config, read) for name, canary in self._by_route.items()}
        self._rolled_back &= {candidate for _, candidate in seen.values() if candidate}
        for name, (stable, candidate) in seen.items():
            canary = self._by_route[name]
            if (stable, candidate) != canary.arms:
                self._by_route[name] = _RouteCanary(canary.config, (stable, candidate))
            if candidate in self._rolled_back and stable and stable.version is not None:
                adapter = read.adapters[canary.config.adapter]
                closed = AdapterVersions(adapter.versions, {**adapter.aliases, canary.config.candidate: stable.version})
                read = replace(read, adapters={**read.adapters, canary.config.adapter: closed})
        return read

    def count(self, decision: Decision, target: Target, *, refused: bool) -> CanaryEnd | None:
        """Count a request's outcome. Returns the alias to move, where that decides the canary.

        Args:
            target: the version that did the job, or refused it.
            refused: the version itself could not be served.
        """
        canary = self._find_undecided(decision.route)
        if canary is None or decision.arm is None:
            return None
        stable, candidate = canary.arms
        if target != (candidate if decision.arm == "canary" else stable):
            return None  # of a version that is not compared any more, or a fallback
        side = canary.candidate if decision.arm == "canary" else canary.stable
        side.requests += 1
        side.errors += refused
        return self._decide(decision.route, canary)

    def count_sides(self, route: str) -> tuple[CanaryCounts, CanaryCounts] | None:
        """Return the counts of the stable version and of the candidate; None: the route has no canary to judge."""
        canary = self._by_route.get(route)
        is_counted = canary is not None and canary.config.judge is not None
        return (canary.stable.tally(), canary.candidate.tally()) if canary is not None and is_counted else None

    def find_arms_to_time(self, route: str | None) -> tuple[Target, Target] | None:
        """Return the stable version and the candidate of a route's undecided canary."""
        canary = self._find_undecided(route)
        stable, candidate = canary.arms if canary else (None, None)
        return (stable, candidate) if stable and candidate else None

    def record_times(
        self, route: str, arms: tuple[Target, Target], token_s: Sequence[float | None]
    ) -> CanaryEnd | None:
        """Record each side's seconds per token of one job. Returns as `count` does."""
        canary = self._find_undecided(route)
        if canary is None or canary.arms != arms or None in token_s:
            return None
        for side, took in zip((canary.stable, canary.candidate), token_s, strict=True):
            side.token_s.append(took or 0.0)
        return self._decide(route, canary)

    def record_failure(self, route: str, arms: tuple[Target, Target]) -> CanaryEnd | None:
        """Record that the candidate failed at a job that the stable version did. Returns as `count` does."""
        canary = self._find_undecided(route)
        if canary is None or canary.arms != arms:
            return None
        canary.candidate.requests += 1
        canary.candidate.errors += 1
        return self._decide(route, canary)

    def _find_undecided(self, route: str | None) -> _RouteCanary | None:
        """Return the route's canary if it has both sides and is not decided."""
        canary = self._by_route.get(route or "")
        open_ = canary is not None and canary.config.judge is not None and not canary.judged
        return canary if canary and open_ and None not in canary.arms else None

    def _decide(self, route: str | None, canary: _RouteCanary) -> CanaryEnd | None:
        stable, candidate = canary.arms
        assert canary.config.judge is not None
        assert stable is not None
        assert candidate is not None  # `_find_undecided` saw to it
        verdict = judge(canary.config.judge, canary.stable.tally(), canary.candidate.tally())
        if verdict.action == "wait":
            return None
        canary.judged = True
        facts = {"route": route, "stable": stable.ref, "candidate": candidate.ref, "reason": verdict.reason}
        logger.warning(json.dumps({"event": f"canary: {verdict.action}"} | facts))
        if verdict.action == "promote":
            return CanaryEnd(candidate.ref or "", canary.config.stable)
        self._rolled_back.add(candidate)
        return CanaryEnd(stable.ref or "", canary.config.candidate)
