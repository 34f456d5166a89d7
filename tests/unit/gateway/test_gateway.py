"""What happens to a gateway between two steps of its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from endpoint import Replicas, publish
from rankloom.config import parse
from rankloom.config.serve import ServeConfig
from rankloom.deploy.descriptions import describe_card
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.policy import Decision, Target
from rankloom.registry import Registry


@asynccontextmanager
async def started(folder: Path, **config: Any) -> AsyncIterator[tuple[Gateway, Registry]]:
    """A gateway with `bank` 1 and 2."""
    registry = Registry(folder / "registry")
    for _ in range(2):
        publish(registry, "bank", folder / "adapters")
    registry.promote("bank@1")
    registry.promote("bank@2", "canary")
    gateway = Gateway(parse(ServeConfig, {"base": "org/base", "refresh_s": 600} | config), registry, Replicas())
    await gateway.start()
    try:
        yield gateway, registry
    finally:
        await gateway.close()


def test_a_canary_is_timed_once_where_two_requests_end_together(tmp_path: Path) -> None:
    timed: list[str] = []

    async def time_sides(route: str, *_: Target) -> None:
        timed.append(route)

    async def run() -> None:
        async with started(tmp_path, routes={"front": {"canary": {"adapter": "bank"}}}) as (gateway, _):
            gateway._time_sides = time_sides  # type: ignore[method-assign]
            candidate = Target("bank", 2)
            request: Any = SimpleNamespace(decision=Decision((candidate,), "front", "canary"), target=candidate)
            gateway._judge(request, None)
            gateway._judge(request, None)
            await asyncio.sleep(0)

    asyncio.run(run())
    assert timed == ["front"]


def test_a_name_may_be_unloaded_while_it_is_loaded(tmp_path: Path) -> None:
    async def run() -> Target:
        async with started(tmp_path) as (gateway, _):
            load = asyncio.create_task(gateway.load("mine", "bank@2"))
            while "mine" not in gateway._loaded:
                await asyncio.sleep(0)
            await gateway.unload("mine")
            return await load

    assert asyncio.run(run()) == Target("bank", 2)


def test_a_loaded_name_is_shown_after_its_adapter_was_removed(tmp_path: Path) -> None:
    async def run() -> dict[str, Any]:
        async with started(tmp_path) as (gateway, registry):
            await gateway.load("mine", "bank@2")
            for version in (1, 2):
                registry.rm(f"bank@{version}", force=True)
            await gateway.refresh()
            return describe_card(gateway, "mine")

    assert asyncio.run(run()).items() >= {"id": "mine", "ref": None}.items()
