"""Row: one request on its way: its tokens, its text, and when it is over."""

from __future__ import annotations

import random
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rankloom.adapters.folded import Folded
from rankloom.serving.choices import Choice
from rankloom.serving.protocol import Delta, Likelihood, Request, TokenLogprobs
from rankloom.serving.sampling import Chosen, Turn
from rankloom.serving.stream import Stream
from rankloom.serving.text import Pieces, TextStream

ALIKE = 64
"""Tokens of two prompts that are the same where a part of one is worth waiting for."""


class Row:
    """Invariant: `tokens` are the prompt and what was generated; the first `cached` have keys and values."""

    def __init__(
        self,
        request: Request,
        stream: Stream,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
        choice: Choice | None,
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
        self.adapter: Folded | None = None
        """Set while it has a place in the batch."""
        self.arrival = -1
        self.ended = False
        self._end_ids, self._choice = end_ids, choice
        self._limit = min(self.num_prompt + request.sampling.max_tokens, context)
        self._random = random.Random(request.sampling.seed)
        self._text = TextStream(tokenizer, request.prompt, request.sampling.stop)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def turn(self) -> Turn:
        """How its next token is to be chosen; to be asked for once a token."""
        allowed = None if self._choice is None else self._choice.allowed
        return Turn(self.request.sampling, self.request.prompt, self.generated, self._random.random(), allowed)

    def take(self, chosen: Chosen, pieces: Pieces) -> bool:
        """Add the chosen token, and those that follow from it, and send what is new; True: that was the last."""
        new, is_over = [chosen.token], self._ends_with(chosen.token)
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
        text = "".join(self._text.push(token) for token in kept if not self._ends_with(token))
        if finish is not None:
            text += self._text.finish()
        if self._text.stopped:
            finish = "stop"
        self.stream.send(Delta(text, tuple(kept), _logprobs(chosen, pieces), finish, self.num_reused))
        return finish is not None

    def _ends_with(self, token: int) -> bool:
        return token in self._end_ids and not self.request.sampling.ignore_eos


def _logprobs(chosen: Chosen, pieces: Pieces) -> tuple[TokenLogprobs, ...]:
    if chosen.logprob is None:
        return ()
    top = tuple(Likelihood(token, logprob, pieces[token]) for token, logprob in chosen.top)
    return (TokenLogprobs(Likelihood(chosen.token, chosen.logprob, pieces[chosen.token]), top),)
