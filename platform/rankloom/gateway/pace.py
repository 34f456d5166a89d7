"""The pace of a version: its seconds per token, on a job of the endpoint's own.

Clients' requests would not do: clients choose their prompts, lengths, options and reading speed, and a sticky client
can choose the side that they count for.
"""

from __future__ import annotations

import time
import uuid

from rankloom.engine.jobs import CompletionJob
from rankloom.engine.protocol import Sampling
from rankloom.gateway.in_flight import InFlightRequest

TOKENS = 9


def pace_job() -> CompletionJob:
    """Make a job of a few tokens after a short prompt."""
    sampling = Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    return CompletionJob(id=uuid.uuid4().hex, adapter=None, prompts=("Hello",), sampling=sampling, max_tokens=TOKENS)


async def measure_token_seconds(request: InFlightRequest) -> float | None:
    """Return the mean seconds between tokens, so without queue and prompt; None where all came at once."""
    begun = last = time.monotonic()
    counts = []
    async for progress in request:
        last = time.monotonic()
        counts.append(progress.num_tokens)
    later = sum(counts[1:])
    return (last - begun) / later if later else None
