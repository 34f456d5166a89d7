"""The app against its own OpenAPI document: what the document allows, and much that it does not, over a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import positive_data_acceptance

from endpoint import listening
from rankloom.config import parse
from rankloom.config.engine import EngineConfig
from rankloom.config.serve import ServeConfig
from rankloom.deploy.ingress import build_api
from rankloom.engine.engine import ServingEngine
from rankloom.engine.jobs import CompletionJob, JobProgress, run
from rankloom.gateway.gateway import Gateway, Served
from rankloom.models import Base
from rankloom.registry import Registry
from served import load, publish, write_adapter


class OneEngine:
    """`gateway.Replicas`: an engine in this process, started with the first call."""

    def __init__(self, base: Base, registry: Registry) -> None:
        self.base = base
        self.engine = ServingEngine(base, registry, EngineConfig(max_num_seqs=8, max_cpu_loras=2))

    def run(self, work: CompletionJob) -> AsyncIterator[JobProgress]:
        return run(self.engine, work)

    async def describe(self) -> Served:
        if not self.engine.alive:
            await self.engine.start()
        return Served(self.base.id, self.base.fingerprint, self.base.quantization, self.engine.context)

    async def load(self, ref: str) -> None:
        await self.engine.pin(ref)
        await self.engine.unpin(ref)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> Iterator[tuple[str, list[str]]]:
    """Where it listens, and models that it has, one of which is refused when it is loaded."""
    root, folder = tmp_path_factory.mktemp("registry"), tmp_path_factory.mktemp("adapters")
    base, kinds = load(tiny_model("llama")), ["lora", "dora", "silent"]
    for kind in kinds:
        write_adapter(tiny_model("llama"), folder / kind, kind)
        publish(root, tiny_model("llama"), kind, folder / kind, probe=kind != "silent")
    config = parse(ServeConfig, {"base": base.id, "limits": {"max_tokens": 8, "timeout_s": 20}})
    replicas = OneEngine(base, Registry(root))
    with listening(Gateway(config, Registry(root), replicas)) as url:
        yield url, [base.id, *kinds]
    asyncio.run(replicas.engine.close())


def no_gateway() -> Gateway:
    raise AssertionError("the document does not depend on it")


document = schemathesis.openapi.from_dict(build_api(no_gateway).openapi())


@document.parametrize()
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_makes_it_fail(case: Any, served: tuple[str, list[str]]) -> None:
    url, models = served
    asked = case.body.get("model") if isinstance(case.body, dict) else None
    if isinstance(asked, str) and len(asked) <= 512:  # a name made up is no model; most requests are to be answered
        case.body["model"] = ([*models, asked])[len(asked) % (len(models) + 1)]
    case.call_and_validate(
        base_url=url,
        timeout=30,
        excluded_checks=[positive_data_acceptance],  # the document does not know the limits
    )
