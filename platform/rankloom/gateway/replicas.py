"""The replicas as the gateway knows them. `deploy/app.py` has them behind a handle of Ray Serve."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rankloom.engine.forward import Job, Progress
from rankloom.engine.tokens import TokenizeJob, Tokens


@dataclass(frozen=True)
class Served:
    """The base, as the replicas describe it."""

    base: str
    fingerprint: str
    quantization: str
    context: int
    routes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The paths of the engine's own server, with the keys of their bodies (`engine.forward.Forwarder`)."""


class Replicas(Protocol):
    """The processes that hold the base and run jobs."""

    def run(self, job: Job) -> AsyncIterator[Progress]:
        """Run a job, as `engine.jobs.run` or a `Forwarder` does. Raises ReplicaLostError when the process dies."""
        ...

    async def describe(self) -> Served: ...

    async def load(self, ref: str) -> None:
        """Load and verify an adapter where its requests will go. Raises as `Engine.pin` does."""
        ...

    async def tokenize(self, job: TokenizeJob) -> Tokens: ...

    async def detokenize(self, tokens: tuple[int, ...]) -> str: ...
