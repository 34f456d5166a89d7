"""Row: one request on its way: its tokens, its text, and when it is over."""

from __future__ import annotations

import random
from typing import Literal

from rankloom.banks.served_adapter import ServedAdapter
from rankloom.engine.choices import ChoiceState
from rankloom.engine.guide import Guide
from rankloom.engine.protocol import Delta, Request
from rankloom.engine.sampling import SampledToken, SamplingInput
from rankloom.engine.stream import Stream
from rankloom.engine.text import Decoder
from rankloom.engine.transcript import Transcript

ALIKE = 64
"""Tokens of two prompts that are the same where a part of one is worth waiting for."""


class RunningSequence:
    """Invariant: `tokens` are the prompt and what was generated; the first `cached` have keys and values."""

    def __init__(
        self,
        request: Request,
        stream: Stream,
        decoder: Decoder,
        end_ids: frozenset[int],
        guide: Guide,
        context: int,
    ) -> None:
        self.request, self.stream = request, stream
        self.tokens = list(request.prompt)
        self.num_prompt = len(request.prompt)
        self.cached = 0
        self.whose = (request.tenant, request.adapter)
        """Whose keys and values it may take over, and leave."""
        self.beginning = (self.whose, request.prompt[:ALIKE]) if len(request.prompt) > ALIKE else None
        """Requests with the same one are worth computing one after the other; None: too short."""
        self.num_reused = 0
        """Tokens of the prompt that came from another row."""
        self.adapter: ServedAdapter | None = None
        """Set while it has a place in the batch."""
        self.arrival = -1
        self.ended = False
        self._ends = frozenset[int]() if request.sampling.ignore_eos else end_ids
        self._guide = guide  # which is shared as long as one has it
        self._choice = None if guide.tree is None else ChoiceState(guide.tree)
        self._limit = min(self.num_prompt + request.sampling.max_tokens, context)
        self._random = random.Random(request.sampling.seed)
        self._transcript = Transcript(decoder, request.prompt, guide.stops, self._ends)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def turn(self) -> SamplingInput:
        """How its next token is to be chosen; to be asked for once a token."""
        allowed = None if self._choice is None else self._choice.allowed
        return SamplingInput(self.request.sampling, self.request.prompt, self.generated, self._random.random(), allowed)

    def take(self, chosen: SampledToken) -> bool:
        """Add the chosen token, and those that follow from it, and send what is new; True: that was the last."""
        new, is_over = [chosen.token], chosen.token in self._ends
        if self._choice is not None:
            self._choice.advance(chosen.token)
            if self.request.sampling.logprobs is None:  # without them, what has no alternative need not be computed
                new += self._choice.rest()
            is_over = self._choice.is_over
        kept = new[: self._limit - len(self.tokens)]
        self.tokens += kept
        finish: Literal["stop", "length"] | None = None
        if is_over and len(kept) == len(new):
            finish = "stop"
        elif len(self.tokens) >= self._limit:
            finish = "length"
        text = self._transcript.push(kept, () if chosen.logprob is None else [chosen])
        if finish is not None:
            text += self._transcript.finish()
        if self._transcript.stopped:
            finish = "stop"
        logprobs = self._transcript.logprobs(last=finish is not None)
        self.stream.send(Delta(text, tuple(kept), logprobs, finish, self.num_reused))
        return finish is not None
