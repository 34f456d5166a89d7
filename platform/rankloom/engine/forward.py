"""Requests that an engine's own server reads: what an ingress sends for one, and what comes back. Without torch.

`jobs.py` is for those that rankloom reads itself. To a gateway both are a `Job`, whose stream is of `Progress`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rankloom.engine.jobs import CompletionJob, JobProgress

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize",
    "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank",
)  # fmt: skip
"""What may be asked of an engine's server, as far as it has it; never what changes it, such as loading adapters."""


@dataclass(frozen=True)
class ForwardJob:
    """One request, with its body as the client sent it."""

    id: str
    """Unique among the jobs in flight."""
    adapter: str | None
    """An exact version, `name@3`; None: the base."""
    path: str
    """Of the server, such as /v1/embeddings."""
    body: Mapping[str, Any]
    """`model` is the client's own name for it, which the answers get again."""
    n: int = 1
    """Completions of each prompt."""
    num_prompts: int = 1
    max_tokens: int = 0
    """The most tokens of each completion."""
    tenant: str | None = None
    """As `Request.tenant`."""
    prompts: tuple[()] = ()
    """None that are known here."""

    @property
    def most_tokens(self) -> int:
        return self.num_prompts * self.n * self.max_tokens

    @property
    def num_ends(self) -> int:
        """The number of ends that its progress reports: one, that of the whole answer."""
        return 1


@dataclass(frozen=True)
class ForwardProgress:
    """A part of the answer: an event of a stream, or all of it."""

    prompt_tokens: int
    """As far as they are known."""
    num_tokens: int
    """Generated since the last progress."""
    num_ends: int
    cached_tokens: int
    streams: bool
    """Whether it is of a stream, so that the first one tells when the first tokens came."""
    body: Mapping[str, Any] | None = None
    """None: the end of a stream."""
    event: str | None = None
    """The event's name, where it has one."""


Job = CompletionJob | ForwardJob
Progress = JobProgress | ForwardProgress


@runtime_checkable
class Forwarder(Protocol):
    """An engine with a server of its own."""

    @property
    def routes(self) -> Mapping[str, tuple[str, ...]]:
        """The paths of the server that may be asked, with the keys of their bodies."""
        ...

    def forward(self, job: ForwardJob) -> AsyncIterator[ForwardProgress]:
        """Have the server do a job. Closing the iterator ends it.

        Raises:
            RequestError: the server refuses it. And whatever `Engine.generate` raises.
        """
        ...
