"""The completions of one HTTP request: what an ingress sends to a replica, and how an engine does it.

A `CompletionJob` is n completions of each of its prompts, on one adapter; `run` makes an engine request for each
completion and merges their deltas.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from rankloom.engine.chat.reader import ChatReader
from rankloom.engine.protocol import ChatPrompt, Delta, Echo, Engine, OpenChat, Pooling, Request, Sampling
from rankloom.errors import RankloomError, RequestError

AT_ONCE = 4096
"""Characters whose work takes a few milliseconds, so that it is done on the event loop; more, in a thread."""
MOST = 256
"""Tokens with logprobs, or deltas, that come together; each may have twenty likeliest ones."""
EMBEDDED_AT_ONCE = 16
"""Prompts of a job that are embedded at a time, so that an engine's queue has room for others."""


class ContextError(RequestError):
    """Prompt and completion don't fit the context."""


class ReplicaLostError(RankloomError, RuntimeError):
    """The process that ran the job is gone."""


Prompt = str | tuple[int, ...] | ChatPrompt


@dataclass(frozen=True)
class CompletionJob:
    """Completions of one or several prompts on one adapter."""

    id: str
    """Unique among the jobs in flight."""
    adapter: str | None
    """An exact version, `name@3`; None: the base."""
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    n: int = 1
    """Completions of each prompt."""
    echo: bool = False
    """Whether a completion begins with its prompt, which has logprobs where these are asked for."""
    max_tokens: int | None = None
    """The most tokens of each completion, 0 for none; None: as many as fit, up to `Sampling.max_tokens`."""
    context: int | None = None
    """The most tokens of prompt and completion together, where that is less than the engine's."""
    tenant: str | None = None
    """As `Request.tenant`."""
    pooling: Pooling | None = None
    """Each prompt is embedded so, and nothing is generated; None: prompts are completed."""

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def most_tokens(self) -> int:
        """The most tokens that its completions may have together."""
        return self.num_ends * (self.sampling.max_tokens if self.max_tokens is None else self.max_tokens)

    @property
    def num_ends(self) -> int:
        """The number of completions, of which each reports its end."""
        return self.num_prompts * self.n


@dataclass(frozen=True)
class JobProgress:
    """What a job has generated since the last progress."""

    prompt_tokens: int
    """Total over all prompts; constant."""
    deltas: tuple[tuple[int, Delta], ...]
    """(completion, delta); completion `p * n + k` is the k-th of prompt p."""

    @property
    def streams(self) -> bool:
        return True

    @property
    def num_tokens(self) -> int:
        return sum(len(delta.tokens) for _, delta in self.deltas)

    @property
    def num_ends(self) -> int:
        return sum(delta.finish is not None for _, delta in self.deltas)

    @property
    def cached_tokens(self) -> int:
        """Of the first prompt, final with its end; 0: not known."""
        return max((delta.cached_tokens for index, delta in self.deltas if index == 0), default=0)


async def run(engine: Engine, job: CompletionJob) -> AsyncIterator[JobProgress]:
    """Run a job on an engine, and yield what its completions have generated since the last time.

    Closing the iterator ends the engine's requests.

    Raises:
        ContextError: a prompt is too long. And whatever `Engine.generate` raises.
    """
    room = min(engine.context, job.context or engine.context)
    if sum(map(_count_characters, job.prompts)) > AT_ONCE:  # a long prompt must not hold up the event loop
        chats = await asyncio.to_thread(lambda: [_open(engine, prompt, job.sampling) for prompt in job.prompts])
    else:
        chats = [_open(engine, prompt, job.sampling) for prompt in job.prompts]
    requests: list[tuple[Request, ChatReader | None]] = []
    drawn: Counter[tuple[int, ...]] = Counter()
    for prompt, chat in zip(job.prompts, chats, strict=True):
        tokens = tuple(chat.tokens)
        scored = job.sampling.logprobs if job.echo else None
        limited = _fit(job, len(tokens), room).model_copy(update={"grammar": chat.grammar, "prompt_logprobs": scored})
        for number in range(drawn[tokens], drawn[tokens] + job.n):
            id, sampling = f"{job.id}-{len(requests)}", _set_seed(limited, number)
            shows_marks = chat.make_parser is not None
            request = Request(id, job.adapter, tokens, sampling, job.tenant, shows_marks, job.pooling)
            requests.append((request, _make_reader(prompt, chat)))
        drawn[tokens] += job.n
    total = sum(len(chat.tokens) for chat in chats)
    places = asyncio.Semaphore(EMBEDDED_AT_ONCE if job.pooling else len(requests))
    arrived: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue()

    async def follow(index: int, request: Request, reader: ChatReader | None) -> None:
        try:
            async with places:
                deltas = engine.generate(request)
                if job.echo:
                    deltas = _put_before(engine.open_echo(request.prompt), deltas)
                async for delta in deltas:
                    arrived.put_nowait((index, delta if reader is None else reader.read(delta)))
        except Exception as error:
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    tasks = [asyncio.create_task(follow(index, *request)) for index, request in enumerate(requests)]
    left = len(tasks)
    try:
        while left:
            items = [await arrived.get()]
            size = _weigh(items[0])
            while not arrived.empty() and size < MOST:
                items.append(arrived.get_nowait())
                size += _weigh(items[-1])
            if not arrived.empty():  # let others run: for a client that reads late, all the rest is here at once
                await asyncio.sleep(0)
            left -= items.count(None)
            deltas = tuple(item for item in items if isinstance(item, tuple))
            if deltas:
                yield JobProgress(total, deltas)
            for item in items:
                if isinstance(item, BaseException):
                    raise item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _put_before(echo: Echo, deltas: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    """Yield a prompt as deltas without tokens, and then its completion's. Threads make the texts, which take long."""
    is_over = False
    async for delta in deltas:
        scored = delta.prompt_logprobs
        for start in range(0, len(scored), MOST):
            yield await asyncio.to_thread(echo.push, scored[start : start + MOST])
        if not is_over and (not scored or delta.finish is not None):
            is_over = True
            yield await asyncio.to_thread(echo.finish)
        if not scored or delta.finish is not None:
            yield replace(delta, prompt_logprobs=())


def _open(engine: Engine, prompt: Prompt, sampling: Sampling) -> OpenChat:
    if isinstance(prompt, ChatPrompt):
        chat = engine.open_chat(prompt, sampling.grammar)
        return chat if sampling.choices is None else replace(chat, make_parser=None)  # all of a choice is the answer
    return OpenChat(engine.tokenize(prompt) if isinstance(prompt, str) else list(prompt), sampling.grammar)


def _make_reader(prompt: Prompt, chat: OpenChat) -> ChatReader | None:
    if chat.make_parser is None:
        return None
    return ChatReader(chat.make_parser(), parallel=not isinstance(prompt, ChatPrompt) or prompt.parallel)


def _weigh(item: tuple[int, Delta] | BaseException | None) -> int:
    return max(1, len(item[1].logprobs)) if isinstance(item, tuple) else 1


def _count_characters(prompt: Prompt) -> int:
    """Return the number of characters to tokenise, about."""
    if isinstance(prompt, ChatPrompt):
        calls = [str(message["tool_calls"]) for message in prompt.messages if "tool_calls" in message]
        texts = [*(message["content"] for message in prompt.messages), *calls, str(prompt.tools)]
        return 64 * len(texts) + sum(map(len, texts))
    return len(prompt) if isinstance(prompt, str) else 0


def _set_seed(sampling: Sampling, number: int) -> Sampling:
    """Return the sampling of a prompt's number-th completion; each completion has a seed of its own."""
    if sampling.seed is None:
        return sampling
    return sampling.model_copy(update={"seed": (sampling.seed + number) % 2**63})


def _fit(job: CompletionJob, prompt_tokens: int, room: int) -> Sampling:
    """Return the sampling with the job's `max_tokens`, or with as many as fit."""
    asked = job.max_tokens if job.max_tokens is not None else 1
    if not prompt_tokens:
        raise RequestError("The prompt is empty.")
    if prompt_tokens + asked > room:
        wanted = f"{prompt_tokens} in the prompt" + (f", {asked} for the completion" if job.max_tokens else "")
        raise ContextError(
            f"This model's maximum context length is {room} tokens. However, your request needs more: {wanted}. "
            f"Shorten the prompt or lower max_tokens."
        )
    most = asked if job.max_tokens is not None else min(job.sampling.max_tokens, room - prompt_tokens)
    return job.sampling.model_copy(update={"max_tokens": most})
