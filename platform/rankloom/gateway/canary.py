"""The canaries of an ingress: how each side did since its candidate came, and what follows from that.

Where a canary stands is in the registry, as two aliases. Here are only the tallies, and which candidates were rolled
back while the registry does not say so yet.
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
    canary_arms,
    judge,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CanaryEnd:
    """An alias that is to be moved: the end of a canary."""

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
class _Trial:
    """One route's canary. Its sides begin anew when a version changes."""

    config: CanaryConfig
    arms: tuple[Target | None, Target | None] = (None, None)
    stable: _Side = field(default_factory=_Side)
    candidate: _Side = field(default_factory=_Side)
    judged: bool = False


class Canaries:
    """Follows the canary of every route that has one: who is compared, and what each side has done."""

    def __init__(self, routes: Mapping[str, RouteConfig]) -> None:
        self.routes = routes
        self._trials = {name: _Trial(route.canary) for name, route in routes.items() if route.canary}
        self._rolled_back: set[Target] = set()

    def follow(self, read: Catalogue) -> Catalogue:
        """What was read of the registry, without the candidates that were rolled back here.

        The registry may be slow, or not writable: for this endpoint their canary is over all the same.
        """
        seen = {name: canary_arms(trial.config, read) for name, trial in self._trials.items()}
        self._rolled_back &= {candidate for _, candidate in seen.values() if candidate}
        for name, (stable, candidate) in seen.items():
            trial = self._trials[name]
            if (stable, candidate) != trial.arms:
                self._trials[name] = _Trial(trial.config, (stable, candidate))
            if candidate in self._rolled_back and stable and stable.version is not None:
                adapter = read.adapters[trial.config.adapter]
                closed = AdapterVersions(adapter.versions, {**adapter.aliases, trial.config.candidate: stable.version})
                read = replace(read, adapters={**read.adapters, trial.config.adapter: closed})
        return read

    def count(self, decision: Decision, target: Target, *, refused: bool) -> CanaryEnd | None:
        """Remember how an answer went; tell which alias to move, where that decides the canary.

        Args:
            target: who answered, or was to.
            refused: the version itself could not be served.
        """
        trial = self._undecided(decision.route)
        if trial is None or decision.arm is None:
            return None
        stable, candidate = trial.arms
        if target != (candidate if decision.arm == "canary" else stable):
            return None  # of a version that is not compared any more, or a fallback
        side = trial.candidate if decision.arm == "canary" else trial.stable
        side.requests += 1
        side.errors += refused
        return self._decide(decision.route, trial)

    def to_time(self, route: str | None) -> tuple[Target, Target] | None:
        """The stable version and the candidate of a canary whose pace counts."""
        trial = self._undecided(route)
        stable, candidate = trial.arms if trial else (None, None)
        return (stable, candidate) if stable and candidate else None

    def timed(self, route: str, arms: tuple[Target, Target], token_s: Sequence[float | None]) -> CanaryEnd | None:
        """Remember the seconds that each side took to a token of the same work; the rest as `count`."""
        trial = self._undecided(route)
        if trial is None or trial.arms != arms or None in token_s:
            return None
        for side, took in zip((trial.stable, trial.candidate), token_s, strict=True):
            side.token_s.append(took or 0.0)
        return self._decide(route, trial)

    def failed(self, route: str, arms: tuple[Target, Target]) -> CanaryEnd | None:
        """Remember that the candidate could not do what the stable version did; the rest as `count`."""
        trial = self._undecided(route)
        if trial is None or trial.arms != arms:
            return None
        trial.candidate.requests += 1
        trial.candidate.errors += 1
        return self._decide(route, trial)

    def _undecided(self, route: str | None) -> _Trial | None:
        """The route's canary, if it has both sides and is not decided."""
        trial = self._trials.get(route or "")
        open_ = trial is not None and trial.config.judge is not None and not trial.judged
        return trial if trial and open_ and None not in trial.arms else None

    def _decide(self, route: str | None, trial: _Trial) -> CanaryEnd | None:
        stable, candidate = trial.arms
        assert trial.config.judge is not None
        assert stable is not None
        assert candidate is not None  # `_undecided` saw to it
        verdict = judge(trial.config.judge, trial.stable.tally(), trial.candidate.tally())
        if verdict.action == "wait":
            return None
        trial.judged = True
        facts = {"route": route, "stable": stable.ref, "candidate": candidate.ref, "reason": verdict.reason}
        logger.warning(json.dumps({"event": f"canary: {verdict.action}"} | facts))
        if verdict.action == "promote":
            return CanaryEnd(candidate.ref or "", trial.config.stable)
        self._rolled_back.add(candidate)
        return CanaryEnd(stable.ref or "", trial.config.candidate)
