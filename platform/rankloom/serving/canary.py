"""The canaries of an ingress: how each side did since its candidate came, and what follows from that.

Where a canary stands is in the registry, as two aliases. Here are only the tallies, and which candidates were rolled
back while the registry does not say so yet.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rankloom.config.serve import CanaryConfig, RouteConfig
from rankloom.serving.policy import Catalogue, Decision, Shelf, Tally, Target, canary_arms, judge

WINDOW = 1024
"""Answers whose pace is remembered."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Move:
    """An alias that is to be moved: the end of a canary."""

    ref: str
    alias: str


@dataclass
class _Side:
    requests: int = 0
    errors: int = 0
    token_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def tally(self) -> Tally:
        return Tally(self.requests, self.errors, tuple(self.token_s))


@dataclass
class _Trial:
    """One route's canary. Its sides begin anew when a version changes."""

    config: CanaryConfig
    arms: tuple[Target | None, Target | None] = (None, None)
    stable: _Side = field(default_factory=_Side)
    candidate: _Side = field(default_factory=_Side)
    judged: bool = False


class Canaries:
    """Those of all routes."""

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
                shelf = read.shelves[trial.config.adapter]
                closed = Shelf(shelf.versions, {**shelf.aliases, trial.config.candidate: stable.version})
                read = replace(read, shelves={**read.shelves, trial.config.adapter: closed})
        return read

    def count(self, decision: Decision, target: Target, *, failed: bool, token_s: float | None) -> Move | None:
        """Remember how an answer went; tell which alias to move, where that decides the canary.

        Args:
            target: who answered, or was to.
            token_s: seconds per token; None where nothing was generated.
        """
        trial = self._trials.get(decision.route or "")
        if trial is None or decision.arm is None or trial.judged:
            return None
        stable, candidate = trial.arms
        if stable is None or candidate is None or target != (candidate if decision.arm == "canary" else stable):
            return None  # of a version that is not compared any more, or a fallback
        side = trial.candidate if decision.arm == "canary" else trial.stable
        side.requests += 1
        side.errors += failed
        if token_s is not None and not failed:
            side.token_s.append(token_s)
        if trial.config.judge is None:
            return None
        verdict = judge(trial.config.judge, trial.stable.tally(), trial.candidate.tally())
        if verdict.action == "wait":
            return None
        trial.judged = True
        facts = {"route": decision.route, "stable": stable.ref, "candidate": candidate.ref, "reason": verdict.reason}
        logger.warning(json.dumps({"event": f"canary: {verdict.action}"} | facts))
        if verdict.action == "promote":
            return Move(candidate.ref or "", trial.config.stable)
        self._rolled_back.add(candidate)
        return Move(stable.ref or "", trial.config.candidate)
