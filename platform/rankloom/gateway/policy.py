"""Routing: from a model's name to exact versions, as pure functions that neither wait nor read.

A `Catalogue` is what an ingress knows at one instant. `decide_route` picks the versions for one request, `judge`
compares a canary with the stable version, `rank_replicas` orders the replicas for a job.
"""

from __future__ import annotations

import bisect
import difflib
import hmac
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from rankloom.config.serve import REF_PATTERN, CanaryConfig, JudgeConfig, RouteConfig
from rankloom.config.trial import BASE
from rankloom.errors import AdapterNotFoundError
from rankloom.registry.store import CHAMPION, LATEST

MOST_TIMES = 1024
"""Measurements of a side's pace that are remembered."""
NEAR = 32
"""Names on each side in the alphabet that are compared with one that is not known."""


@dataclass(frozen=True)
class Target:
    """An exact version of an adapter, or the base."""

    adapter: str | None = None
    """None: the base."""
    version: int | None = None

    @property
    def ref(self) -> str | None:
        """`name@3`, as an engine knows it; None: the base."""
        return None if self.adapter is None else f"{self.adapter}@{self.version}"


@dataclass(frozen=True)
class AdapterVersions:
    """One adapter's versions that fit the base."""

    versions: tuple[int, ...]
    """Ascending, at least one."""
    aliases: Mapping[str, int] = field(default_factory=dict)

    def find_version(self, selector: str | None) -> int | None:
        """Return the version that a selector means, or None. Without a selector: the champion, else the latest."""
        if selector == LATEST or (selector is None and CHAMPION not in self.aliases):
            return self.versions[-1]
        is_number = selector is not None and selector.isdigit() and not selector.startswith("0")
        number = int(selector or 0) if is_number else self.aliases.get(selector or CHAMPION)
        return number if number in self.versions else None


@dataclass(frozen=True)
class Catalogue:
    """All names and their meanings. Invariant: every version in it fits the base."""

    base: str
    """The base's id."""
    adapters: Mapping[str, AdapterVersions] = field(default_factory=dict)
    offered: tuple[str, ...] | None = None
    """The refs that may be asked for by name, as configured; None: all."""
    routes: Mapping[str, RouteConfig] = field(default_factory=dict)
    loaded: Mapping[str, Target] = field(default_factory=dict)
    """Names that were given to versions at run time."""
    secret: bytes = field(default=b"", repr=False)
    """Sticky routes draw with it, so that clients can't predict which side a user gets."""

    @property
    def public_base(self) -> str:
        """The base's id for clients; a folder's path stays private."""
        is_path = self.base.startswith(("/", "~", ".")) or self.base.count("/") > 1
        return BASE if is_path else self.base

    def list_models(self) -> list[str]:
        """List the names to show: the base, routes, then adapters."""
        refs = self.adapters if self.offered is None else [r for r in self.offered if self.find(r)]
        return list(dict.fromkeys([self.public_base, *self.routes, *self.loaded, *(r for r in refs if r != BASE)]))

    def find(self, ref: str) -> Target | None:
        """Find what a ref in the configuration means: any version in `adapters`, or the base."""
        if ref == BASE:
            return Target()
        name, _, selector = ref.partition("@")
        adapter = self.adapters.get(name)
        version = adapter.find_version(selector or None) if adapter else None
        return None if version is None else Target(name, version)

    def resolve(self, model: str) -> Target | None:
        """Resolve a client's model name, routes aside; None: it has no meaning, or is not offered."""
        if model in (self.base, BASE):
            return Target()
        if model in self.loaded:
            return self.loaded[model]
        if not re.fullmatch(REF_PATTERN, model):
            return None
        if self.offered is None:
            return self.find(model)
        name, _, selector = model.partition("@")
        of_name = self._offered_of.get(name, [])
        if model in of_name or name in of_name:  # offered without a selector: every version
            return self.find(model)
        if not selector:
            return self.find(of_name[0]) if of_name else None
        target = self.find(model)
        return target if target in [self.find(ref) for ref in of_name] else None

    def find_near(self, model: str) -> list[str]:
        """Return names similar to an unknown one; only its neighbours in the alphabet are compared."""
        at = bisect.bisect(self._alphabet, model)
        return difflib.get_close_matches(model[:128], self._alphabet[max(0, at - NEAR) : at + NEAR], n=3, cutoff=0.5)

    @cached_property
    def _offered_of(self) -> Mapping[str, list[str]]:
        """The refs that are offered, by their adapter."""
        found: dict[str, list[str]] = {}
        for ref in self.offered or ():
            found.setdefault(ref.partition("@")[0], []).append(ref)
        return found

    @cached_property
    def _alphabet(self) -> list[str]:
        return sorted(self.list_models())


@dataclass(frozen=True)
class RoutingRequest:
    """The parts of a request that routing depends on."""

    model: str
    id: str
    """Differs from request to request."""
    user: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names are in lower case."""
    trace: str | None = None
    """The client's own name for the request; nothing is decided by it."""


@dataclass(frozen=True)
class Decision:
    """The versions that a request goes to."""

    targets: tuple[Target, ...]
    """At least one; each further one is used where those before it can't be served."""
    route: str | None = None
    arm: Literal["stable", "canary"] | None = None
    """Which side of a canary it is; None: there is none, or a rule or fallback decided."""
    shadow: Target | None = None


def decide_route(request: RoutingRequest, catalogue: Catalogue) -> Decision:
    """Decide where a request goes: on one catalogue always to the same versions.

    Raises:
        AdapterNotFoundError: the model's name means nothing here, or nothing of its route can be served.
    """
    route = catalogue.routes.get(request.model)
    if route is None:
        target = catalogue.resolve(request.model)
        if target is None:
            raise AdapterNotFoundError(_explain_unknown(request.model, catalogue.find_near(request.model)))
        return Decision((target,))
    first, arm = _choose_first_target(request, route, catalogue)
    wanted = [first, *(catalogue.find(ref) for ref in route.fallback)]
    targets = tuple(dict.fromkeys(target for target in wanted if target is not None))
    if not targets:
        raise AdapterNotFoundError(f"The route `{request.model}` leads to no adapter that is there.")
    shadow = None
    if route.shadow and draw(request.model, "shadow", request.id) < route.shadow.share:
        shadow = catalogue.find(route.shadow.to)
    return Decision(targets, request.model, arm if first is not None else None, shadow)


def _choose_first_target(
    request: RoutingRequest, route: RouteConfig, catalogue: Catalogue
) -> tuple[Target | None, Literal["stable", "canary"] | None]:
    """Return the route's first choice, fallbacks aside."""
    for rule in route.rules:
        if request.headers.get(rule.header.lower()) == rule.equals:
            return catalogue.find(rule.to), None
    by = ("user", request.user) if route.sticky and request.user else ("id", request.id)
    lot = draw(request.model, *by, secret=catalogue.secret)
    if route.canary:
        stable, candidate = find_canary_arms(route.canary, catalogue)
        if candidate is None:
            return stable, None
        return (candidate, "canary") if lot < route.canary.share else (stable, "stable")
    if route.split:
        return catalogue.find(_pick_at(lot, route.split)), None
    return catalogue.find(route.to or BASE), None


def find_canary_arms(canary: CanaryConfig, catalogue: Catalogue) -> tuple[Target | None, Target | None]:
    """Return the stable version and the candidate, or None where its alias is missing or means the stable version."""
    stable = catalogue.find(f"{canary.adapter}@{canary.stable}")
    candidate = catalogue.find(f"{canary.adapter}@{canary.candidate}")
    return stable, None if candidate == stable else candidate


def draw(*parts: str | None, secret: bytes = b"") -> float:
    """Return a number in [0, 1), uniformly distributed, that depends on `parts` and `secret` alone."""
    digest = hmac.digest(secret, "\0".join(part or "" for part in parts).encode(), "sha256")
    return int.from_bytes(digest[:7]) / 2**56  # 56 bits: a float holds no quotient below 1 as 1


def _pick_at(lot: float, weights: Mapping[str, float]) -> str:
    """Return the key whose share of [0, 1) contains `lot`."""
    position = lot * sum(weights.values())
    for key, weight in weights.items():
        if position < weight:
            return key
        position -= weight
    return key


def _explain_unknown(model: str, near: Sequence[str]) -> str:
    shown = model if len(model) <= 80 else f"{model[:77]}..."
    hint = f" Did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else ""
    return f"The model `{shown}` does not exist.{hint}"


@dataclass(frozen=True)
class CanaryCounts:
    """The record of one side of a canary since the candidate appeared."""

    requests: int = 0
    errors: int = 0
    """Requests in which the version itself failed."""
    token_s: tuple[float, ...] = ()
    """Seconds per token of one fixed job, latest measurements."""


@dataclass(frozen=True)
class Verdict:
    """What to do with a canary, and why."""

    action: Literal["wait", "promote", "roll back"]
    reason: str


def judge(config: JudgeConfig, stable: CanaryCounts, candidate: CanaryCounts) -> Verdict:
    """Decide whether the candidate is worse than the stable version by more than the margins, or good enough."""
    is_asked = min(stable.requests, candidate.requests) >= config.min_requests
    is_timed = min(len(stable.token_s), len(candidate.token_s)) >= min(config.min_requests, MOST_TIMES)
    if is_asked:
        failed, usual = candidate.errors / candidate.requests, stable.errors / stable.requests
        if failed > usual + config.error_margin:
            return Verdict("roll back", f"it failed {failed:.1%} of its requests, the stable version {usual:.1%}")
    if is_timed:
        slow, pace = statistics.median(candidate.token_s), statistics.median(stable.token_s)
        if slow > pace * config.latency_ratio:
            return Verdict("roll back", f"it takes {1e3 * slow:.1f} ms a token, the stable version {1e3 * pace:.1f} ms")
    if not (is_asked and is_timed):
        return Verdict("wait", f"fewer than {config.min_requests} requests on one of them, or timed less often")
    if config.promote_after is not None and candidate.requests >= config.promote_after:
        return Verdict("promote", f"not worse in {candidate.requests} requests")
    return Verdict("wait", "not worse")


def rank_replicas(adapter: str | None, loads: Mapping[str, int], *, room: int, spill: float = 1.5) -> list[str]:
    """Order replicas by preference, best first.

    Every adapter has a replica of its own by hashing, where its weights stay (rendezvous hashing, Thaler and
    Ravishankar 1998, with bounded loads, arXiv 1608.01350): the first in its order that is not overloaded. So all who
    ask agree without talking, and when a replica goes, only its adapters move. For the base the least loaded is best,
    and of several the first one given.

    Args:
        loads: requests in flight on each replica.
        room: requests that a replica works on at once; with fewer it is never overloaded.
        spill: with more, it is overloaded above this many times the mean load.
    """
    if adapter is None:
        return sorted(loads, key=lambda replica: loads[replica])
    order = sorted(loads, key=lambda replica: draw(adapter, replica), reverse=True)
    bound = max(room, spill * (sum(loads.values()) + 1) / max(1, len(loads)))
    return sorted(order, key=lambda replica: loads[replica] + 1 > bound)
