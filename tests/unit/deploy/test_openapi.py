"""The app against its own OpenAPI document: what the document allows, and much that it does not, over a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import positive_data_acceptance

from endpoint import listening
from one_engine import OneEngine
from rankloom.config import parse
from rankloom.config.serve import ServeConfig
from rankloom.deploy.ingress import build_api
from rankloom.gateway.gateway import Gateway
from rankloom.registry import Registry
from served import load, publish, write_adapter


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
