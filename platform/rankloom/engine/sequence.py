"""RunningSequence: the tokens of one request, its text, and when it ends."""

from __future__ import annotations

import random
from typing import Literal

from torch import Tensor

from rankloom.banks.served_adapter import ServedAdapter
from rankloom.engine.attention import SequenceChunk
from rankloom.engine.guide import Guide
from rankloom.engine.masks import TokenMask
from rankloom.engine.prompt_pooler import PromptPooler
from rankloom.engine.prompt_scorer import PromptScorer
from rankloom.engine.protocol import Delta, Request, SampledToken
from rankloom.engine.sampling import SamplingInput
from rankloom.engine.scheduler import ScheduledChunk
from rankloom.engine.stream import Stream
from rankloom.engine.text import Decoder
from rankloom.engine.transcript import Transcript

Finish = Literal["stop", "length"]

SHARED_PREFIX = 64
"""Tokens that two prompts must share for the later one to wait until the first has computed them."""


class RunningSequence:
    """Invariant: `tokens` are the prompt and the completion; the first `cached` have keys and values."""

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
        self.owner = (request.tenant, request.adapter)
        """It shares keys and values with sequences of the same tenant and adapter alone."""
        self.predicts = request.sampling.max_tokens > 0 and request.pooling is None
        """False: its prompt is computed, and nothing else."""
        most_likely = request.sampling.prompt_logprobs
        self._scorer = None if most_likely is None else PromptScorer(request.prompt, most_likely)
        self._pooler = None if request.pooling is None else PromptPooler(request.pooling, self.num_prompt)
        is_shared = not self.is_read and len(request.prompt) > SHARED_PREFIX
        self.beginning = (self.owner, request.prompt[:SHARED_PREFIX]) if is_shared else None
        """Sequences with the same beginning are computed one after the other; None: too short, or to be read."""
        self.stops: tuple[int, ...] = ()
        """Numbers of tokens after which the states of its layers are kept for others."""
        self.num_reused = 0
        """Tokens of the prompt owner keys and values came from another sequence."""
        self.adapter: ServedAdapter | None = None
        """Set while it has a place in the batch."""
        self.arrival = -1
        self.ended = False
        self._embedding: bytes | None = None
        self._guide = guide  # kept here, because `Guides` holds it weakly
        self.constraint = guide.make_constraint()
        """None: every token may come."""
        self._ends = frozenset[int]() if request.sampling.ignore_eos and self.constraint is None else end_ids
        self._limit = min(self.num_prompt + request.sampling.max_tokens, context)
        self._random = random.Random(request.sampling.seed)
        self._unsent: list[tuple[list[int], SampledToken, Finish | None]] = []
        self._chance: float | None = None
        """The next token's random number; None: not drawn yet."""
        self._transcript = Transcript(decoder, request.prompt, guide.stops, self._ends)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def is_scored(self) -> bool:
        """Whether the logits after each token of its prompt are still to be read."""
        return self._scorer is not None and not self._scorer.is_done

    @property
    def is_pooled(self) -> bool:
        """Whether its prompt is embedded."""
        return self._pooler is not None

    @property
    def is_read(self) -> bool:
        """Whether its prompt's tokens are needed themselves, so that none of them may come from the cache."""
        return self.is_scored or self.is_pooled

    def make_chunk(self, chunk: ScheduledChunk) -> SequenceChunk:
        """Return a chunk as a forward needs it."""
        tokens = self.tokens[chunk.start : chunk.start + chunk.count]
        return SequenceChunk(
            chunk.id, self.adapter, chunk.start, tokens, chunk.predicts, scored=self.is_scored, pooled=self.is_pooled
        )

    def read_prompt(self, start: int, logits_tV: Tensor | None, hidden_tD: Tensor | None) -> bool:
        """Take what a step gave for a chunk of the prompt, and send it. Returns False where it is not finite."""
        if self._scorer is not None and logits_tV is not None:
            scored = self._scorer.score(start, logits_tV)
            if scored is None:
                return False
            self.stream.send(Delta("", prompt_logprobs=scored))
        if self._pooler is not None and hidden_tD is not None:
            self._pooler.pool(start, hidden_tD)
            if self._pooler.is_done:
                self._embedding = self._pooler.read()
                return self._embedding is not None
        return True

    def send_end(self) -> None:
        """Send the end of a sequence that predicts nothing."""
        finish: Finish = "length" if self._pooler is None else "stop"
        self.stream.send(Delta("", finish=finish, cached_tokens=self.num_reused, embedding=self._embedding or b""))

    def make_sampling_input(self, mask: TokenMask | None) -> SamplingInput:
        """Return what sampling its next token needs.

        Args:
            mask: its constraint's; None: it has none.
        """
        if self._chance is None:
            self._chance = self._random.random()
        return SamplingInput(self.request.sampling, self.request.prompt, self.generated, self._chance, mask)

    def take(self, sampled: SampledToken) -> bool:
        """Add the sampled token and those that it implies. Returns True at the end; `send` finds stop strings too."""
        self._chance = None
        new, is_over = [sampled.token], sampled.token in self._ends
        if self.constraint is not None and not is_over:
            self.constraint.advance(sampled.token)
            # tokens without an alternative need no forward, unless it is to give logprobs
            if self.request.sampling.logprobs is None:
                new += self.constraint.take_forced()
            is_over = self.constraint.is_over
        kept = new[: self._limit - len(self.tokens)]
        self.tokens += kept
        finish: Finish | None = None
        if is_over and len(kept) == len(new):
            finish = "stop"
        elif len(self.tokens) >= self._limit:
            finish = "length"
        self._unsent.append((kept, sampled, finish))
        return finish is not None

    def send(self) -> bool:
        """Send what was taken. Returns True at the end."""
        unsent, self._unsent = self._unsent, []
        for kept, sampled, finish in unsent:
            text = self._transcript.push(kept, () if sampled.logprob is None else [sampled])
            if finish is not None:
                text += self._transcript.finish()
            if self._transcript.stopped:
                finish = "stop"
            logprobs = self._transcript.take_logprobs(last=finish is not None)
            self.stream.send(Delta(text, tuple(kept), logprobs, finish, self.num_reused))
            if finish is not None:
                return True
        return False
