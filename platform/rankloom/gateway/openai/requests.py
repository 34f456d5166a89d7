"""OpenAI's request bodies as types. `responses.py` writes the responses, `errors.py` the errors.

A key that is not known is refused, and so is a known one that asks for what is not done here: nothing is ignored but
what says nothing about the answer (`user` counts for sticky routes). null is as good as absent, as at OpenAI.
`bodies.py` parses the bytes into a request, or reports the first mistake in them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from rankloom.config.serve import LimitsConfig, ServeConfig
from rankloom.config.trial import Name
from rankloom.engine.jobs import CompletionJob, Prompt
from rankloom.engine.protocol import ChatPrompt, Sampling
from rankloom.gateway.openai.body import LIST, TEXT, Body, Off, On, Text, choose_either, limit_keys, limit_length
from rankloom.gateway.openai.errors import WireError
from rankloom.gateway.openai.messages import Messages
from rankloom.gateway.openai.prompts import Prompts, list_prompts
from rankloom.gateway.openai.structured import ResponseFormat, StructuredOutputs
from rankloom.gateway.openai.tools import NamedTool, ToolChoice, Tools, choose_tools


class StreamOptions(Body):
    include_usage: bool | None = None
    """Send the usage in a chunk of its own at the end."""
    include_obfuscation: Off | None = None
    continuous_usage_stats: Off | None = None


class _CompatibilityKeys(Body):
    """Keys of OpenAI, vLLM and llama.cpp with the values that ask for what is done anyway, or have no effect here."""

    metadata: Annotated[dict[str, Text | None], Field(max_length=16), limit_keys(16)] | None = None
    """Without effect."""
    store: Off | None = None
    service_tier: Text | None = None
    """Without effect: all requests are served alike."""
    safety_identifier: Text | None = None
    """Without effect."""
    prompt_cache_key: Text | None = None
    """Without effect: a shared beginning is found without it."""
    prompt_cache_options: dict[str, Any] | None = None
    """Without effect."""
    prompt_cache_retention: Text | None = None
    """Without effect."""
    cache_prompt: On | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0), limit_keys(0)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    """As many as `n`: all that are made are answered."""
    suffix: Annotated[Text, Field(max_length=0)] | None = None
    use_beam_search: Off | None = None
    length_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=0)] | None = None
    skip_special_tokens: On | None = None
    spaces_between_special_tokens: On | None = None
    include_stop_str_in_output: Off | None = None
    stop_token_ids: Annotated[list[Any], Field(max_length=0)] | None = None
    bad_words: Annotated[list[Any], Field(max_length=0)] | None = None
    return_tokens_as_token_ids: Off | None = None


_SAMPLING_KEYS = (
    "temperature", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos",
)  # fmt: skip
"""Keys that a request and `Sampling` share."""
_Stop = Annotated[Text, Field(max_length=256)]
_StopList = Annotated[
    list[Annotated[_Stop, Field(min_length=1)]], Field(max_length=64, fail_fast=True), limit_length(4096)
]
_StopOrList = Annotated[
    Annotated[_Stop, Tag(TEXT)] | Annotated[_StopList, Tag(LIST)], choose_either("expected a text or a list of texts")
]


class _Common(_CompatibilityKeys):
    """The keys of both kinds of request."""

    model: Annotated[Text, Field(max_length=512)]
    """An adapter, `adapter@version`, `adapter@alias`, a route, or the base's id."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Completions of each prompt."""
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Most tokens of a completion."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """0: the likeliest token alone."""
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    """Not OpenAI's; -1 and 0: all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Not OpenAI's."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """Not OpenAI's."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Any whole number of 64 bits, also one below 0."""
    stop: _StopOrList | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """Not OpenAI's: what the completion is to match."""
    ignore_eos: bool | None = None
    """Not OpenAI's: continue up to max_tokens; for measurements."""
    user: Annotated[Text, Field(max_length=512)] | None = None
    """The end user, for sticky routes."""

    def _make_job(
        self,
        id: str,
        limits: LimitsConfig,
        tenant: str | None,
        prompts: tuple[Prompt, ...],
        sampling: Sampling,
        max_tokens: int | None,
    ) -> CompletionJob:
        return CompletionJob(
            id=id, adapter=None, prompts=prompts, sampling=sampling, n=self.n or 1, echo=bool(self.echo),
            max_tokens=max_tokens, context=limits.context, tenant=tenant,
        )  # fmt: skip

    def _make_sampling(self, limits: LimitsConfig, logprobs: int | None) -> Sampling:
        asked = {name: value for name in _SAMPLING_KEYS if (value := getattr(self, name)) is not None}
        if self.top_p is not None:
            asked["top_p"] = max(self.top_p, 1e-6)  # no token is likelier than all others and less likely than this
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            **asked,
            max_tokens=limits.max_tokens,
            top_k=max(0, self.top_k or 0),
            seed=None if self.seed is None else self.seed % 2**63,
            stop=tuple(filter(None, stop)),
            logprobs=logprobs,
            **self._choose_constraint(),
        )

    def _choose_constraint(self) -> dict[str, Any]:
        """Return the settings of `Sampling` that constrain the completion. Raises WireError for two constraints."""
        grammar = None if self.response_format is None else self.response_format.make_grammar()
        if self.structured_outputs is None:
            return {"grammar": grammar}
        if grammar is not None:
            raise WireError(400, "Give response_format or structured_outputs, not both.", param="structured_outputs")
        return self.structured_outputs.make_constraint()

    def _check(self, limits: LimitsConfig, max_tokens: int | None, prompts: int) -> None:
        if max_tokens is not None and max_tokens > limits.max_tokens:
            raise WireError(400, f"max_tokens {max_tokens} is above {limits.max_tokens}.", param="max_tokens")
        if (count := prompts * (self.n or 1)) > limits.completions:
            raise WireError(400, f"{count} completions in one request, above {limits.completions}.", param="n")
        if self.best_of not in (None, 1, self.n or 1):
            raise WireError(400, "best_of: all completions that are made are answered; give n alone.", param="best_of")


class ChatRequest(_Common):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    """Whether an answer may have several calls; null: as true."""
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    prediction: dict[str, Any] | None = None
    """Without effect: it never changes an answer, and here not the time it takes."""
    verbosity: Literal["medium"] | None = None
    reasoning_effort: None = None
    moderation: None = None
    audio: None = None
    web_search_options: None = None
    echo: Off | None = None
    add_generation_prompt: On | None = None
    continue_final_message: Off | None = None

    def make_job(self, id: str, config: ServeConfig, tenant: str | None = None) -> CompletionJob:
        """Make a job on the base. Raises WireError where the body asks for more than the limits."""
        limits = config.limits
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise WireError(400, "Give max_completion_tokens or max_tokens, not both.", param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise WireError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        most = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        self._check(limits, most, 1)
        sampling = self._make_sampling(limits, (self.top_logprobs or 0) if self.logprobs else None)
        prompt = self._make_prompt()
        if prompt.must_call and (sampling.grammar or sampling.choices):
            raise WireError(400, "A forced call can't also follow response_format.", param="tool_choice")
        return self._make_job(id, limits, tenant, (prompt,), sampling, most)

    def _make_prompt(self) -> ChatPrompt:
        """Make the conversation. Raises WireError for a choice among tools that are not given."""
        tools, must_call = choose_tools(self.tools or (), self.tool_choice)
        messages = tuple(message.to_template() for message in self.messages)
        several = self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedTool)
        return ChatPrompt(messages, tuple(tool.to_template() for tool in tools), must_call, several)


class CompletionRequest(_Common):
    """`POST /v1/completions`."""

    prompt: Prompts
    """A text, several, or the same as token ids."""
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    """Most tokens of a completion; 0: none, for the prompt's own logprobs, with `echo`."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """The logprobs of each token, and of this many likeliest ones at its place."""
    echo: bool | None = None
    """Begin each completion with its prompt, whose tokens then have logprobs too, all but the first."""

    def make_job(self, id: str, config: ServeConfig, tenant: str | None = None) -> CompletionJob:
        """Make a job on the base. Raises WireError where the body asks for more than the limits."""
        limits = config.limits
        prompts = list_prompts(self.prompt)
        most = 16 if self.max_tokens is None else self.max_tokens
        most = min(most, limits.max_tokens) if self.max_tokens is None else most
        self._check(limits, most, len(prompts))
        return self._make_job(id, limits, tenant, prompts, self._make_sampling(limits, self.logprobs), most)


class AdapterRequest(Body):
    """`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, with vLLM's keys."""

    lora_name: Name
    """The model name that it gets, or had."""
    lora_path: Annotated[Text, Field(max_length=512)] | None = None
    """A ref in this endpoint's registry, such as `bank@3`; no path of a file system. null: as lora_name."""


class PromoteRequest(Body):
    """`POST /console/promote`: point an alias to a version."""

    adapter: Name
    version: Annotated[int, Field(ge=1)]
    alias: Name


class RollbackRequest(Body):
    """`POST /console/rollback`: point an alias to its version before the last promotion."""

    adapter: Name
    alias: Name
