"""Models and routes as the API and the console show them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from rankloom.config.serve import RouteConfig
from rankloom.config.trial import BASE
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.policy import Catalogue, find_canary_arms
from rankloom.registry.card import list_scorecard_rows

Describe = Callable[[Gateway, str], dict[str, Any]]


def cache_by_catalogue(describe: Describe) -> Callable[[Gateway], Awaitable[bytes]]:
    """Describe all models as the items of a JSON list: in a thread, as there may be thousands, and once a catalogue."""
    latest: tuple[Any, asyncio.Future[bytes]] | None = None

    def describe_all(gateway: Gateway) -> bytes:
        return ", ".join(json.dumps(describe(gateway, name)) for name in gateway.catalogue.list_models()).encode()

    async def get(gateway: Gateway) -> bytes:
        nonlocal latest
        source = (gateway.catalogue, gateway.config)
        if latest is None or latest[0][0] is not source[0] or latest[0][1] is not source[1]:
            latest = source, asyncio.ensure_future(asyncio.to_thread(describe_all, gateway))
        return await asyncio.shield(latest[1])

    return get


def describe_model(gateway: Gateway, name: str) -> dict[str, Any]:
    """Return a model as OpenAI's API shows it."""
    target = gateway.catalogue.resolve(name) if name not in gateway.catalogue.routes else None
    entry: dict[str, Any] = {"id": name, "object": "model", "created": gateway.created, "owned_by": "rankloom"}
    if target and target.ref:
        entry |= {"root": target.ref, "parent": gateway.catalogue.public_base}
        if record := gateway.registry_view.record(target.ref):
            entry["created"] = int(record.created.timestamp())
    return entry | {"max_model_len": gateway.context}


def describe_card(gateway: Gateway, name: str) -> dict[str, Any]:
    """Return what the console shows of a model: its exact version, its aliases and its scorecard."""
    model = describe_model(gateway, name)
    target = gateway.catalogue.resolve(name) if name not in gateway.catalogue.routes else None
    record = gateway.registry_view.record(target.ref) if target and target.ref else None
    adapter = gateway.catalogue.adapters.get(record.name) if record else None
    if record is None or adapter is None:  # a loaded name outlives its version in the registry
        return model | {"ref": None}
    rows = list_scorecard_rows(record.scorecard) if record.scorecard else []
    return model | {
        "ref": record.ref,
        "adapter": record.name,
        "versions": adapter.versions,
        "aliases": dict(adapter.aliases),
        "method": record.method,
        "created": f"{record.created:%Y-%m-%d}",
        "rows": rows,
    }


def describe_route(gateway: Gateway, name: str, *, with_counts: bool) -> dict[str, Any]:
    """Return where a route's requests go, and by which shares.

    Args:
        with_counts: whether a canary's counts are shown.
    """
    route, catalogue = gateway.catalogue.routes[name], gateway.catalogue
    arms = list(_list_arms(route, catalogue))
    counts = gateway.canaries.count_sides(name) if with_counts and len(arms) == 2 else None
    for arm, count in zip(arms, counts or (), strict=False):
        arm |= {"requests": count.requests, "errors": count.errors}
    canary = route.canary
    return {
        "name": name,
        "arms": arms,
        "rules": [f"{rule.header}: {rule.equals} goes to {rule.to}" for rule in route.rules],
        "sticky": route.sticky,
        "fallback": route.fallback,
        "shadow": route.shadow and {"to": route.shadow.to, "share": route.shadow.share},
        "canary": canary and {"adapter": canary.adapter, "stable": canary.stable, "candidate": canary.candidate},
    }


def _list_arms(route: RouteConfig, catalogue: Catalogue) -> Iterator[dict[str, Any]]:
    """Yield each target as it is configured, the version that it means now, and its share of the requests."""
    if route.canary is not None:
        stable, candidate = find_canary_arms(route.canary, catalogue)
        share = 0.0 if candidate is None else route.canary.share
        yield {"to": f"{route.canary.adapter}@{route.canary.stable}", "ref": stable and stable.ref, "share": 1 - share}
        if candidate is not None:
            to = f"{route.canary.adapter}@{route.canary.candidate}"
            yield {"to": to, "ref": candidate.ref, "share": share}
        return
    weights = route.split or {route.to or BASE: 1.0}
    for to, weight in weights.items():
        target = catalogue.find(to)
        ref = None if target is None else target.ref or BASE
        yield {"to": to, "ref": ref, "share": weight / sum(weights.values())}
