"""The protocol between an ingress and an engine, without torch.

A request goes in as tokens, and comes back as an iterator of deltas. The gateway handles names, aliases, routes and
limits; an engine knows exact versions (`name@3`), whose weights never change.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from rankloom.config.base import Frozen
from rankloom.engine.chat.pieces import Parser


class Grammar(Frozen):
    """What a completion matches as a whole, unless it is cut."""

    kind: Literal["json", "regex", "grammar", "lark"]
    """A JSON schema, as text; a regular expression; a grammar in Lark's notation or GBNF (the names are vLLM's); one of
    the engine's own in Lark's notation."""
    text: str


class Sampling(Frozen):
    """How a request's tokens are sampled; sequences of one batch may differ in it."""

    max_tokens: Annotated[int, Field(ge=0)] = 16
    """The most that are generated; 0: the prompt is computed, and nothing else."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from this many of the likeliest tokens; 0: from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the logit of every token that was generated already."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the logit of every generated token, once for each time it was generated."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    """Divides the logit, if it is above 0, else multiplies it, of every token of prompt and completion."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """With a seed, a request always gives the same tokens, whatever the batch; null: a random seed."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=64)] = ()
    """The completion ends before the first of these; the text has none of it."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """The natural logarithm of each token's probability as the model gives it, before temperature, penalties and
    cuts, and of this many of the likeliest tokens; null: none."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """As `logprobs`, of the prompt's tokens; null: none."""
    choices: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    """The completion is one of these texts, whole."""
    grammar: Grammar | None = None
    """The completion matches this; not together with `choices`."""
    ignore_eos: bool = False
    """Continue past the end of the turn, up to `max_tokens`; for measurements."""


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation that the base's chat template turns into a prompt."""

    messages: tuple[Mapping[str, Any], ...]
    """Oldest first: each with `role` and `content`, and perhaps `name`, `tool_calls` (arguments as objects) or
    `tool_call_id`."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """That the assistant may call, as in OpenAI's requests."""
    must_call: tuple[str, ...] = ()
    """Names of tools of which the answer is a call; empty: as the model likes."""
    parallel: bool = True
    """Whether an answer may have several calls."""


@dataclass(frozen=True)
class Pooling:
    """How the last layer's hidden states of a prompt's tokens become one vector, its embedding."""

    kind: Literal["mean", "last", "cls"]
    """Their mean, the last token's or the first one's."""
    dimensions: int | None = None
    """Numbers that are kept, from the first; None: all."""
    normalize: bool = True
    """Whether what is kept is scaled to length 1."""


@dataclass(frozen=True)
class OpenChat:
    """A conversation as a prompt, and how its answer is read."""

    tokens: list[int]
    grammar: Grammar | None = None
    """That the completion follows."""
    make_parser: Callable[[], Parser] | None = None
    """Makes a parser for one completion; None: all of it is the answer."""


@dataclass(frozen=True)
class Request:
    """One completion. Several completions of one prompt (`n`) are several requests."""

    id: str
    """Unique among the requests in flight."""
    adapter: str | None
    """An exact version, `name@3`; None: the base."""
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: Sampling
    tenant: str | None = None
    """The id of the key that it belongs to; requests share cached prefixes within a tenant alone."""
    shows_marks: bool = False
    """Whether its text has the special tokens that a parser of chats reads."""
    pooling: Pooling | None = None
    """The prompt is to be embedded, so nothing is generated; None: it is to be completed."""


@dataclass(frozen=True)
class SampledToken:
    """A token as a model chose it, or as a prompt has it."""

    token: int
    logprob: float | None
    """None: not asked for, or the first token of a prompt."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their logprobs."""


@dataclass(frozen=True)
class Likelihood:
    """A token and the natural logarithm of its probability."""

    token: int
    logprob: float | None
    """None: the first token of a prompt, which nothing predicts."""
    piece: bytes
    """The bytes that it adds to the text; they may be a part of a UTF-8 character."""
    name: str | None = None
    """The name of a token that the text does not show, such as the end of the turn."""


@dataclass(frozen=True)
class TokenLogprobs:
    """The likelihood of a token, and those of the likeliest tokens at its place."""

    chosen: Likelihood
    top: tuple[Likelihood, ...]
    """Likeliest first; `Sampling.logprobs` of them."""


@dataclass(frozen=True)
class CallDelta:
    """A part of a call of a tool."""

    index: int
    """Which of the completion's calls."""
    id: str | None
    """With the first part of a call, as is its name."""
    name: str | None
    arguments: str
    """A part of a JSON text."""


@dataclass(frozen=True)
class Delta:
    """What was generated since the delta before. The last one of a completion has `finish`.

    The texts of all deltas together are the completion. Text waits while it may be the beginning of a stop string or of
    a character, so that a delta may have tokens and no text.
    """

    text: str
    tokens: tuple[int, ...] = ()
    """All generated tokens, the one that ended the turn included."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One a token where the request asks for them, as soon as its text is certain. Their pieces, one after the other,
    are the completion; none is of a stop string."""
    finish: Literal["stop", "length", "tool_calls"] | None = None
    """stop: the model ended its turn, or a stop string, a whole choice or the end of a grammar was reached; length:
    `max_tokens` or the context was; tool_calls: a turn that has ended with calls."""
    cached_tokens: int = 0
    """Tokens of the prompt that came from the cache; final in the last delta."""
    thinking: str = ""
    """What the model thinks before its answer, where a parser of chats splits it off."""
    calls: tuple[CallDelta, ...] = ()
    """Of a chat with tools."""
    prompt_logprobs: tuple[SampledToken, ...] = ()
    """The prompt's next tokens, before the first generated one; `Echo` makes text of them."""
    embedding: bytes = b""
    """Numbers in fp32, little-endian: in the only delta of a request with `pooling`."""


class Echo(Protocol):
    """The text of one prompt, as the first deltas of its completion."""

    def push(self, tokens: Sequence[SampledToken]) -> Delta:
        """Add the prompt's next tokens."""
        ...

    def finish(self) -> Delta:
        """Return the text that was held back, or the whole text where no tokens were added."""
        ...


@dataclass(frozen=True)
class Resident:
    """An adapter whose weights are in memory."""

    ref: str
    pinned: bool
    num_running: int
    """Requests on it, running or waiting."""
    bytes: int


@dataclass(frozen=True)
class Stats:
    """An engine's state and its counters since the start."""

    running: int
    """Requests in the batch."""
    waiting: int
    """Requests outside of it: queued, preempted, or waiting for their adapter."""
    cache_tokens: int
    """Tokens that the KV cache holds; kept prefixes included."""
    cache_capacity: int
    steps: int
    prompt_tokens: int
    """Computed; not those that were reused."""
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    adapter_loads: int
    adapter_evictions: int
    adapter_failures: int


@runtime_checkable
class Engine(Protocol):
    """One base with the adapters of a registry on it.

    Call its methods on one event loop, except those that take longer for longer texts, which any thread may call:
    `tokenize`, `detokenize`, `name_tokens`, `open_chat` and an `Echo`.
    """

    @property
    def base_id(self) -> str:
        """The id under which the base was loaded."""
        ...

    @property
    def context(self) -> int:
        """The most tokens of prompt and completion together."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it runs; False before `start`, after `close` and after a failure."""
        ...

    async def start(self) -> None:
        """Start the engine. Call it once."""
        ...

    async def close(self) -> None:
        """Stop the engine; requests in flight get an OverloadedError. To drain, wait for them first."""
        ...

    def tokenize(self, text: str, *, begins: bool = True) -> list[int]:
        """Return the token ids of a text, as in training.

        Args:
            begins: it begins a prompt, so that a token comes first where the tokenizer puts one there.
        """
        ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included. Raises RequestError for one that is not known."""
        ...

    def name_tokens(self, tokens: Sequence[int]) -> list[str]:
        """Return the names of tokens in the tokenizer's vocabulary."""
        ...

    def open_chat(self, prompt: ChatPrompt, grammar: Grammar | None) -> OpenChat:
        """Make a prompt of a conversation by the base's chat template, up to the assistant's turn.

        Args:
            grammar: that the answer is to follow.

        Raises:
            RequestError: there is no template, or it refuses the conversation or shows no tools.
        """
        ...

    def open_echo(self, prompt: Sequence[int]) -> Echo:
        """Return what makes text of a prompt; it shows special tokens, other than the one before every text."""
        ...

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Generate the completion as a stream. Closing the iterator, or cancelling its task, ends the request.

        An adapter that is not resident is loaded while other requests continue.

        Raises:
            RequestError: it can't be served here: too long, an unknown token, choices that become the same tokens, a
                grammar that can't be honoured, an embedding of more numbers than there are, or of an engine without.
            AdapterNotFoundError: no such version.
            RegistryError: the adapter is broken, does nothing, or needs a feature that this engine lacks.
            IncompatibleError: the adapter was tuned on another base.
            OverloadedError: the queue is full, or the engine is stopping; nothing was done.
        """
        ...

    async def pin(self, ref: str) -> None:
        """Load an adapter, unless it is there, and keep it. Raises as `generate` does."""
        ...

    async def unpin(self, ref: str) -> None:
        """Allow a pinned adapter to be evicted. Does nothing for one that is not pinned."""
        ...

    def list_resident(self) -> tuple[Resident, ...]:
        """Return the adapters in memory, the most recently used last."""
        ...

    def get_stats(self) -> Stats: ...
