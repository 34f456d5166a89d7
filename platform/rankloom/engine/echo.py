"""PromptEcho: a prompt as the first deltas of its completion: its text, and its tokens' logprobs."""

from __future__ import annotations

from collections.abc import Sequence

from rankloom.engine.protocol import Delta, SampledToken
from rankloom.engine.text import NO_STOPS, Decoder
from rankloom.engine.transcript import Transcript


class PromptEcho:
    """The `Echo` of `protocol.py`."""

    def __init__(self, decoder: Decoder, prompt: Sequence[int]) -> None:
        self._transcript = Transcript(decoder, (), NO_STOPS, frozenset())
        self._unread: Sequence[int] = prompt

    def push(self, tokens: Sequence[SampledToken]) -> Delta:
        self._unread = ()
        text = self._transcript.push([], tokens)
        return Delta(text, logprobs=self._transcript.take_logprobs())

    def finish(self) -> Delta:
        text = self._transcript.push(self._unread) if self._unread else ""
        text += self._transcript.finish()
        return Delta(text, logprobs=self._transcript.take_logprobs(last=True))
