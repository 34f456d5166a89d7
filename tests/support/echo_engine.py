"""An engine without a model: it answers with the adapter's name and the prompt, or by a schema; a byte is a token."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Sequence

from rankloom.engine.protocol import (
    ChatPrompt,
    Delta,
    Echo,
    Grammar,
    Likelihood,
    OpenChat,
    Request,
    Resident,
    SampledToken,
    Stats,
    TokenLogprobs,
)
from rankloom.errors import AdapterNotFoundError, OverloadedError, RegistryError, RequestError
from schemas import make_instance


class _BytesEcho:
    """Follows `engine.protocol.Echo`."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._left = list(prompt)

    def push(self, tokens: Sequence[SampledToken]) -> Delta:
        del self._left[: len(tokens)]
        found = []
        for each in tokens:
            top = tuple(Likelihood(token, logprob, bytes([token])) for token, logprob in each.top)
            found.append(TokenLogprobs(Likelihood(each.token, each.logprob, bytes([each.token])), top))
        return Delta("".join(chr(each.token) for each in tokens), logprobs=tuple(found))

    def finish(self) -> Delta:
        left, self._left = self._left, []
        return Delta("".join(map(chr, left)))


class EchoEngine:
    """Follows `serving.protocol.Engine`. Prompts of certain words make it fail or be slow."""

    base_id = "org/base"
    context = 256
    alive = True

    def __init__(self, broken: Sequence[str] = ()) -> None:
        self.broken = set(broken)
        self.reason = "does nothing"
        self.pace_s: dict[str, float] = {}
        """Adapter -> seconds per token."""
        self.fails: dict[str, type[Exception]] = {}
        """Adapter -> error that ends each of its requests after one token."""
        self.under_way: set[str] = set()
        self.cancelled: list[str] = []
        self.pinned: list[str] = []

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def tokenize(self, text: str, *, begins: bool = True) -> list[int]:
        return list(text.encode())

    def detokenize(self, tokens: Sequence[int]) -> str:
        if tokens and max(tokens) > 255:
            raise RequestError(f"tokens: {max(tokens)} is outside of the vocabulary of 256")
        return bytes(tokens).decode("utf-8", "replace")

    def name_tokens(self, tokens: Sequence[int]) -> list[str]:
        return [chr(token) for token in tokens]

    def open_chat(self, prompt: ChatPrompt, grammar: Grammar | None) -> OpenChat:
        if prompt.messages[-1]["role"] != "user":
            raise RequestError("The conversation must end with the user.")
        return OpenChat(self.tokenize("".join(f"{m['role']}={m['content']};" for m in prompt.messages)), grammar)

    def open_echo(self, prompt: Sequence[int]) -> Echo:
        return _BytesEcho(prompt)

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        asked = request.sampling
        prompt = bytes(token % 256 for token in request.prompt).decode("utf-8", "replace")
        assert request.id not in self.under_way
        if request.adapter in self.broken:
            raise RegistryError(f"{request.adapter} {self.reason}")
        if request.adapter and request.adapter.startswith("gone"):
            raise AdapterNotFoundError(f"no adapter {request.adapter}")
        if "overload" in prompt:
            raise OverloadedError("the queue is full", retry_after_s=7)
        if "bug" in prompt:
            raise ZeroDivisionError("with the secret prompt in it")
        text = asked.choices[-1] if asked.choices else f"{request.adapter or 'base'}|{prompt}|"
        if asked.grammar is not None and asked.grammar.kind == "json":
            text = json.dumps(make_instance(json.loads(asked.grammar.text)))
        if "forever" in prompt:
            text *= 1000
        out = text.encode()
        if request.pooling is not None:
            await asyncio.sleep(self.pace_s.get(request.adapter or "", 0))
            numbers = [float(len(request.prompt)), float(request.prompt[0]), len(request.adapter or ""), 0.1]
            numbers = numbers[: request.pooling.dimensions]
            yield Delta("", finish="stop", embedding=struct.pack(f"<{len(numbers)}f", *numbers))
            return
        if asked.prompt_logprobs is not None:
            scored = [SampledToken(t, -0.25, ((t, -0.25), (1, -2.0))[: asked.prompt_logprobs]) for t in request.prompt]
            yield Delta("", prompt_logprobs=(SampledToken(request.prompt[0], None, ()), *scored[1:2]))
            if scored[2:]:
                yield Delta("", prompt_logprobs=tuple(scored[2:]))
        if not asked.max_tokens:
            yield Delta("", finish="length", cached_tokens=3)
            return
        self.under_way.add(request.id)
        try:
            for place in range(len(out)):
                slow = "slow" in prompt or "forever" in prompt
                await asyncio.sleep(self.pace_s.get(request.adapter or "", 0.01 if slow else 0))
                last = place + 1 == min(len(out), asked.max_tokens)
                token = out[place : place + 1]
                finish = None if not last else "stop" if place + 1 == len(out) else "length"
                one = Likelihood(token[0], -0.5, token)
                logprobs = (
                    () if asked.logprobs is None else (TokenLogprobs(one, self._likeliest(one)[: asked.logprobs]),)
                )
                yield Delta(token.decode("latin-1"), (token[0],), logprobs, finish, cached_tokens=3)  # type: ignore[arg-type]
                if error := self.fails.get(request.adapter or ""):
                    raise error("it brings out a bug")
                if last:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(request.id)
            raise
        finally:
            self.under_way.discard(request.id)

    @staticmethod
    def _likeliest(one: Likelihood) -> tuple[Likelihood, ...]:
        others = ((one.token + step) % 256 for step in range(1, 20))
        return (one, *(Likelihood(token, -1.0, bytes([token])) for token in others))

    async def pin(self, ref: str) -> None:
        if ref in self.broken:
            raise RegistryError(f"{ref} does nothing")
        self.pinned.append(ref)

    async def unpin(self, ref: str) -> None:
        self.pinned.remove(ref)

    def list_resident(self) -> tuple[Resident, ...]:
        return tuple(Resident(ref, True, 0, 1) for ref in self.pinned)

    def get_stats(self) -> Stats:
        return Stats(len(self.under_way), *[0] * 11)
