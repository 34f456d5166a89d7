"""Replica: a process with a base and an engine on it, the only part of a deployment that imports torch."""

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from rankloom.config import parse
from rankloom.config.engine import EngineConfig, VllmConfig
from rankloom.config.model import NoQuantization
from rankloom.config.serve import ServeConfig
from rankloom.engine.forward import Forwarder, ForwardJob, Job, Progress
from rankloom.engine.jobs import run
from rankloom.engine.tokens import TokenizeJob, Tokens, detokenize, tokenize
from rankloom.errors import RankloomError
from rankloom.gateway.replicas import Served
from rankloom.paths import get_registry_root
from rankloom.registry import Registry

if TYPE_CHECKING:
    from rankloom.engine.protocol import Engine
    from rankloom.models import Base

NOTE_S = 2.0
"""Seconds between a replica's reports to the ingress."""

logger = logging.getLogger("ray.serve")


def _build(config: ServeConfig, registry: Registry, threads: int, gpus: float) -> "tuple[Base, Engine]":
    """Build the config's engine and its base (for vLLM an outline without weights).

    Args:
        gpus: that are reserved for this process.
    """
    import torch

    from rankloom.engine.engine import ServingEngine
    from rankloom.engine.vllm.engine import VllmEngine
    from rankloom.models import choose_auto_dtype, load_base, load_outline

    assert config.base is not None  # `app.resolve_base` saw to it
    torch.set_num_threads(threads)
    device = torch.device("cuda" if gpus and torch.cuda.is_available() else "cpu")
    if gpus and device.type == "cpu":
        logger.warning("%g GPU(s) are reserved for this replica, but torch finds none; it computes on the CPU", gpus)
    if isinstance(config.engine, VllmConfig):
        outline = load_outline(config.base, dtype=choose_auto_dtype(device))
        return outline, VllmEngine(outline, registry, config.engine, threads=threads, gpus=gpus)
    if device.type == "cuda" and gpus < 1:
        torch.cuda.set_per_process_memory_fraction(gpus)
    base = load_base(config.base, config.quantization or NoQuantization(), device=device)
    assert isinstance(config.engine, EngineConfig)  # `app.resolve_engine` saw to it
    return base, ServingEngine(base, registry, config.engine)


def _read_reserved(kind: str, default: float) -> float:
    """Return how much of a resource is reserved for this process."""
    return float(ray.get_runtime_context().get_assigned_resources().get(kind, default))


ENVIRONMENT = {
    # idle OpenMP threads sleep after a tenth of a millisecond, for Ray's own processes and other replicas need the
    # cores; put to sleep between two operations (PASSIVE) they cost a decoding step on two threads its speed
    "OMP_WAIT_POLICY": "ACTIVE",
    "GOMP_SPINCOUNT": "10000",
    "THP_MEM_ALLOC_ENABLE": "1",  # torch asks for large pages: weights are read 5 % faster
    "TORCHDYNAMO_DISABLE": "1",  # bitsandbytes' import would load the compiler
}
"""What a replica has in its environment, where it has nothing else, before torch is imported."""


class Replica:
    """One engine. Its adapters come from the registry by exact version."""

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._config = parse(ServeConfig, config, "serve")
        self._registry = Registry(self._config.registry or get_registry_root())
        threads, gpus = max(1, int(_read_reserved("CPU", 1))), _read_reserved("GPU", 0)
        self._base, self._engine = await asyncio.to_thread(_build, self._config, self._registry, threads, gpus)
        gc.collect()  # the engine's start keeps the collector from what loading left
        await self._engine.start()
        self._pinned: set[str] = set()
        await self._pin()
        self._notes = asyncio.create_task(self._note())

    async def run(self, job: Job) -> AsyncIterator[Progress]:
        """Run a job, as `engine.jobs.run` does, or have the engine's own server do it."""
        stream: Any = None  # an async generator
        if isinstance(job, ForwardJob):
            assert isinstance(self._engine, Forwarder)  # the gateway knows its routes
            stream = self._engine.forward(job)
        else:
            stream = run(self._engine, job)
        try:
            async for progress in stream:
                yield progress
        finally:
            await stream.aclose()

    async def tokenize(self, job: TokenizeJob) -> Tokens:
        return await tokenize(self._engine, job)

    async def detokenize(self, tokens: tuple[int, ...]) -> str:
        return await detokenize(self._engine, tokens)

    async def describe(self) -> Served:
        routes = self._engine.routes if isinstance(self._engine, Forwarder) else {}
        return Served(self._base.id, self._base.fingerprint, self._base.quantization, self._engine.context, routes)

    async def gpus(self) -> float:
        """Return the GPUs that are reserved for this process."""
        return _read_reserved("GPU", 0)

    async def load(self, ref: str) -> None:
        """Load and verify an adapter, which stays until it is evicted."""
        await self._engine.pin(ref)
        if ref not in self._pinned:
            await self._engine.unpin(ref)

    async def check_health(self) -> None:
        """Raise where the engine has stopped, so that Serve replaces this replica."""
        if not self._engine.alive:
            raise RuntimeError("the engine has stopped")

    async def _pin(self) -> None:
        """Pin the config's adapters, at the versions that their refs mean now."""
        wanted = set()
        for ref in self._config.pinned:
            try:
                wanted.add((await asyncio.to_thread(self._registry.get, ref)).ref)
            except RankloomError as error:
                logger.warning("pinned %s: %s", ref, error)
                return  # until the registry can tell, all stays
        for ref in wanted - self._pinned:
            self._pinned.add(ref)  # first: a `load` that ends at the same time leaves it pinned
            try:
                await self._engine.pin(ref)
            except RankloomError as error:
                self._pinned.discard(ref)
                logger.warning("pinned %s was refused: %s", ref, error)
        for ref in self._pinned - wanted:
            await self._engine.unpin(ref)
            self._pinned.discard(ref)

    async def _note(self) -> None:
        """Report this replica's figures to the ingress, until it ends."""
        context = serve.get_replica_context()
        ingress = serve.get_deployment_handle("Ingress", context.app_name)
        passed_s = 0.0
        while True:
            await asyncio.sleep(NOTE_S)
            passed_s += NOTE_S
            with contextlib.suppress(Exception):  # it may be starting, or ending
                await ingress.note.remote(
                    context.replica_tag, self._engine.get_stats(), len(self._engine.list_resident())
                )
            if self._config.pinned and passed_s >= self._config.refresh_s:
                passed_s = 0.0
                await self._pin()

    async def __del__(self) -> None:
        if hasattr(self, "_notes"):
            self._notes.cancel()
        if hasattr(self, "_engine"):
            await self._engine.close()
