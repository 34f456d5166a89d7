"""A real engine behind a gateway, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from rankloom.config.engine import EngineConfig
from rankloom.engine.engine import ServingEngine
from rankloom.engine.jobs import CompletionJob, JobProgress, run
from rankloom.engine.tokens import TokenizeJob, Tokens, detokenize, tokenize
from rankloom.gateway.replicas import Served
from rankloom.models import Base
from rankloom.registry import Registry


class OneEngine:
    """`gateway.Replicas`: an engine in this process, started with the first call."""

    def __init__(self, base: Base, registry: Registry, **settings: Any) -> None:
        self.base = base
        config = EngineConfig(max_num_seqs=8, max_cpu_loras=2, **settings)
        self.engine = ServingEngine(base, registry, config)

    def run(self, work: CompletionJob) -> AsyncIterator[JobProgress]:
        return run(self.engine, work)

    async def describe(self) -> Served:
        if not self.engine.alive:
            await self.engine.start()
        return Served(self.base.id, self.base.fingerprint, self.base.quantization, self.engine.context)

    async def tokenize(self, job: TokenizeJob) -> Tokens:
        return await tokenize(self.engine, job)

    async def detokenize(self, tokens: tuple[int, ...]) -> str:
        return await detokenize(self.engine, tokens)

    async def load(self, ref: str) -> None:
        await self.engine.pin(ref)
        await self.engine.unpin(ref)
