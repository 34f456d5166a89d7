"""OpenAI's wire, what is asked: request bodies, and errors in OpenAI's shape. `replies.py` has the answers.

A key that is not known is refused, and so is a known one that asks for what is not done here: nothing is ignored but
what says nothing about the answer (`user` counts for sticky routes). null is as good as absent, as at OpenAI.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from rankloom.config.serve import LimitsConfig
from rankloom.config.trial import Name
from rankloom.errors import (
    AdapterNotFoundError,
    ConfigError,
    IncompatibleError,
    OverloadedError,
    RegistryError,
    RequestError,
)
from rankloom.serving.protocol import Sampling
from rankloom.serving.work import ContextError, Conversation, Prompt, ReplicaLostError


class WireError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(max(1, round(self.retry_after_s)))}


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None
    """The key of the request that it is about."""
    code: str | None
    """What a program can tell it by."""


class ErrorReply(BaseModel):
    """The body of every answer that is an error; for the app's document."""

    error: ErrorFacts


def wire_error(error: Exception) -> WireError:
    """How a client learns of a failure; what is no business of his stays in the log."""
    if isinstance(error, WireError):
        return error
    text = str(error)
    if isinstance(error, ContextError):
        return WireError(400, text, code="context_length_exceeded", param="messages")
    if isinstance(error, RequestError):
        return WireError(400, text)
    if isinstance(error, AdapterNotFoundError):
        return WireError(404, text, code="model_not_found", param="model")
    if isinstance(error, (RegistryError, IncompatibleError)):
        return WireError(422, f"The adapter was refused: {text}", code="adapter_refused", param="model")
    if isinstance(error, ConfigError):
        return WireError(400, text)
    if isinstance(error, OverloadedError):
        return WireError(503, text, code="overloaded", retry_after_s=error.retry_after_s)
    if isinstance(error, ReplicaLostError):
        return WireError(503, "The replica that wrote this answer was lost; ask again.", code="replica_lost")
    if isinstance(error, TimeoutError):
        return WireError(504, "The request took longer than this endpoint allows.", code="timeout")
    return WireError(500, "Internal error; the endpoint's log has more under this x-request-id.")


def _unicode(text: str) -> str:
    """JSON can spell half of a character, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no text") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class StreamOptions(_Body):
    include_usage: bool | None = None
    """Send the usage in a chunk of its own at the end."""


class StructuredOutputs(_Body):
    choice: Annotated[list[Annotated[Text, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=1024)]
    """The completion is one of these texts, whole (the key is vLLM's)."""


class PlainText(_Body):
    type: Literal["text"]


_AS_THEY_ARE = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "ignore_eos",
)  # fmt: skip
"""What a request and an engine call alike."""
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class _Common(_Body):
    """What both kinds of request have."""

    model: Annotated[Text, Field(max_length=512)]
    """An adapter, `adapter@version`, `adapter@alias`, a route, or the base's id."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Completions of each prompt."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    """Not OpenAI's; -1 and 0: all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Not OpenAI's."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """Not OpenAI's."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    structured_outputs: StructuredOutputs | None = None
    """Not OpenAI's: the completion is one of the texts in `choice`."""
    ignore_eos: bool | None = None
    """Not OpenAI's: go on to max_tokens; for measuring."""
    user: Annotated[Text, Field(max_length=512)] | None = None
    """Who asks, for sticky routes."""
    metadata: Annotated[dict[str, Text], Field(max_length=16)] | None = None
    """Without effect."""
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Text | None = None
    """Without effect."""
    prompt_cache_key: Text | None = None
    """Without effect: a shared beginning is found without it."""
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: PlainText | None = None

    def _sampling(self, limits: LimitsConfig, logprobs: int | None) -> Sampling:
        asked = {name: value for name in _AS_THEY_ARE if (value := getattr(self, name)) is not None}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            **asked,
            max_tokens=limits.max_tokens,
            top_k=max(0, self.top_k or 0),
            stop=tuple(stop),
            logprobs=logprobs,
            choices=tuple(self.structured_outputs.choice) if self.structured_outputs else None,
        )

    def _check(self, limits: LimitsConfig, max_tokens: int | None, prompts: int) -> None:
        if max_tokens is not None and max_tokens > limits.max_tokens:
            raise WireError(400, f"max_tokens {max_tokens} is above {limits.max_tokens}.", param="max_tokens")
        if (count := prompts * (self.n or 1)) > limits.completions:
            raise WireError(400, f"{count} completions in one request, above {limits.completions}.", param="n")
        if self.stream_options and not self.stream:
            raise WireError(400, "stream_options is for stream: true.", param="stream_options")


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    refusal: None = None

    def pair(self) -> tuple[str, str]:
        """(role, text) as a chat template knows them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ("system" if self.role == "developer" else self.role), text


class ChatRequest(_Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    def wanted(self, limits: LimitsConfig) -> tuple[tuple[Prompt, ...], Sampling, int | None]:
        """(prompts, sampling, max_tokens). Raises WireError where it asks for more than the limits."""
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise WireError(400, "Give max_completion_tokens or max_tokens, not both.", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise WireError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        most = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        self._check(limits, most, 1)
        talk = Conversation(tuple(message.pair() for message in self.messages))
        return (talk,), self._sampling(limits, (self.top_logprobs or 0) if self.logprobs else None), most


Token = Annotated[int, Field(ge=0, lt=2**31)]


class CompletionRequest(_Common):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    )
    """A text, several, or the same as token ids."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def wanted(self, limits: LimitsConfig) -> tuple[tuple[Prompt, ...], Sampling, int | None]:
        """(prompts, sampling, max_tokens). Raises WireError where it asks for more than the limits."""
        prompts: list[Any] = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if isinstance(prompts[0], int):
            prompts = [prompts]
        most = 16 if self.max_tokens is None else self.max_tokens
        most = min(most, limits.max_tokens) if self.max_tokens is None else most
        self._check(limits, most, len(prompts))
        made = tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts)
        return made, self._sampling(limits, self.logprobs), most


class AdapterRequest(_Body):
    """`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, with vLLM's keys."""

    lora_name: Name
    """The model name that it gets, or had."""
    lora_path: Annotated[Text, Field(max_length=512)] | None = None
    """A ref in this endpoint's registry, such as `bank@3`; no path of a file system. null: as lora_name."""
