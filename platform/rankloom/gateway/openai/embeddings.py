"""`/v1/embeddings`: its body, and its response."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rankloom.config.serve import ServeConfig
from rankloom.engine.jobs import CompletionJob, JobProgress
from rankloom.engine.protocol import Pooling, Sampling
from rankloom.gateway.openai.body import Body, Text
from rankloom.gateway.openai.errors import WireError
from rankloom.gateway.openai.prompts import Prompts, list_prompts


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`."""

    model: Annotated[Text, Field(max_length=512)]
    """As in a completion."""
    input: Prompts
    """A text, several, or the same as token ids."""
    dimensions: Annotated[int, Field(ge=1, le=2**20)] | None = None
    """Numbers of each embedding, from the first; null: all. For bases that were trained for it."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: of the numbers in fp32, little-endian."""
    normalize: bool | None = None
    """Not OpenAI's: whether each embedding has length 1; null: it has, as at OpenAI."""
    user: Annotated[Text, Field(max_length=512)] | None = None
    """The end user, for sticky routes."""

    def make_job(self, id: str, config: ServeConfig, tenant: str | None = None) -> CompletionJob:
        """Make a job on the base. Raises WireError where the body asks for more than the limits."""
        prompts = list_prompts(self.input)
        if len(prompts) > (most := config.limits.embeddings):
            raise WireError(400, f"input: {len(prompts)} texts in one request, above {most}.", param="input")
        return CompletionJob(
            id=id, adapter=None, prompts=prompts, sampling=Sampling(max_tokens=0), max_tokens=0,
            context=config.limits.context, tenant=tenant,
            pooling=Pooling(config.pooling, self.dimensions, self.normalize is not False),
        )  # fmt: skip


class EmbeddingBuilder:
    """The response to one request."""

    def __init__(self, body: EmbeddingRequest, count: int) -> None:
        """
        Args:
            count: of texts.
        """
        self._model, self._is_base64 = body.model, body.encoding_format == "base64"
        self._embeddings = [b""] * count
        self._prompt_tokens = 0
        self.length = 0
        """Characters of `iter_body`, about."""

    def add(self, progress: JobProgress) -> None:
        self._prompt_tokens = progress.prompt_tokens
        for index, delta in progress.deltas:
            self._embeddings[index] = delta.embedding
            self.length += 3 * len(delta.embedding)

    def iter_body(self) -> Iterator[str]:
        """Yield the body as JSON, in a part for each text."""
        yield f'{{"object": "list", "model": {json.dumps(self._model)}, "data": ['
        for index, embedding in enumerate(self._embeddings):
            yield (", " if index else "") + f'{{"object": "embedding", "index": {index}, "embedding": '
            yield self._format(embedding) + "}"
        usage = {"prompt_tokens": self._prompt_tokens, "total_tokens": self._prompt_tokens}
        yield f'], "usage": {json.dumps(usage)}}}'

    def _format(self, embedding: bytes) -> str:
        if self._is_base64:
            return f'"{base64.b64encode(embedding).decode()}"'
        numbers = struct.unpack(f"<{len(embedding) // 4}f", embedding)
        return f"[{', '.join(map('%.9g'.__mod__, numbers))}]"  # all that fp32 tells
