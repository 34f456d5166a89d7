"""The body of `/v1/responses`, which becomes a request for a chat. `response_items.py` has the items of its input."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, Tag

from rankloom.config.serve import ServeConfig
from rankloom.engine.jobs import CompletionJob
from rankloom.gateway.openai.body import (
    LIST,
    OBJECT,
    SCHEMA,
    TEXT,
    Body,
    Off,
    Text,
    choose_either,
    limit_keys,
)
from rankloom.gateway.openai.errors import WireError
from rankloom.gateway.openai.requests import ChatRequest
from rankloom.gateway.openai.response_items import Item, make_messages
from rankloom.gateway.openai.structured import BY_FORMAT, JsonObject, NamedSchema, PlainText, StructuredOutputs
from rankloom.gateway.openai.tools import BY_CHOICE, Function


class FlatTool(Function):
    """A tool of `/v1/responses`: flat, where a chat's has `function`."""

    type: Literal["function"]
    allowed_callers: Annotated[list[Literal["direct"]], Field(max_length=1)] | None = None
    defer_loading: Off | None = None
    output_schema: dict[str, Any] | None = None
    """Without effect."""
    is_async: Off | None = Field(default=None, alias="async")

    def to_chat(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function | {"strict": self.strict}}


class FlatToolName(Body):
    type: Literal["function"]
    name: Annotated[Text, Field(max_length=64)]


class FlatAllowedTools(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FlatToolName], Field(max_length=128, fail_fast=True)]


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(TEXT)]
    | Annotated[FlatToolName, Tag(OBJECT)]
    | Annotated[FlatAllowedTools, Tag(LIST)],
    BY_CHOICE,
]


class FlatSchema(NamedSchema):
    """A schema that the answer follows: flat, where a chat's has `json_schema`."""

    type: Literal["json_schema"]


Format = Annotated[
    Annotated[PlainText, Tag(TEXT)] | Annotated[JsonObject, Tag(OBJECT)] | Annotated[FlatSchema, Tag(SCHEMA)],
    BY_FORMAT,
]


class TextConfig(Body):
    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(Body):
    """A model thinks as its chat template has it; only what is so anyway may be asked for."""

    effort: None = None
    summary: Literal["auto"] | None = None
    """Without effect: what is thought comes whole."""
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponseStreamOptions(Body):
    include_obfuscation: Off | None = None


class ResponseRequest(Body):
    """`POST /v1/responses`."""

    model: Annotated[Text, Field(max_length=512)]
    """As in a chat."""
    input: Annotated[
        Annotated[Text, Tag(TEXT)]
        | Annotated[list[Item], Field(min_length=1, max_length=4095, fail_fast=True), Tag(LIST)],
        choose_either("expected a text or a list of items"),
    ]
    """A user's text, or the conversation so far: messages, calls, what these returned, and thoughts."""
    instructions: Text | None = None
    """A system message before the input."""
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: (
        Annotated[
            list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]],
            Field(max_length=16, fail_fast=True),
        ]
        | None
    ) = None
    """`message.output_text.logprobs`: with logprobs. The other is without effect: what is thought comes as text."""
    text: TextConfig | None = None
    tools: Annotated[list[FlatTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    """Without effect: it is about tools that run at OpenAI."""
    reasoning: ReasoningConfig | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Not OpenAI's here: as in a chat."""
    structured_outputs: StructuredOutputs | None = None
    """Not OpenAI's: as in a chat."""
    user: Annotated[Text, Field(max_length=512)] | None = None
    """The end user, for sticky routes."""
    metadata: Annotated[dict[str, Text | None], Field(max_length=16), limit_keys(16)] | None = None
    """Given back with the response."""
    service_tier: Text | None = None
    """Without effect, as the next four."""
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: Text | None = None
    truncation: Literal["disabled"] | None = None
    store: Off | None = None
    previous_response_id: None = None
    conversation: None = None
    background: Off | None = None
    background_options: None = None
    context_management: Annotated[list[Any], Field(max_length=0)] | None = None
    prompt: None = None
    moderation: None = None
    image: None = None
    access_programs: None = None

    _chat: ChatRequest = PrivateAttr()

    def model_post_init(self, _: Any) -> None:
        """Make the chat where the body is parsed: of a large one, in a thread."""
        self._chat = ChatRequest.model_validate(self._to_chat())

    @property
    def has_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    def make_job(self, id: str, config: ServeConfig, tenant: str | None = None) -> CompletionJob:
        """Make a job on the base, as a chat's. Raises WireError where the body asks for more than the limits."""
        if self.top_logprobs and not self.has_logprobs:
            raise WireError(400, "top_logprobs: needs include: message.output_text.logprobs.", param="top_logprobs")
        if self.max_output_tokens is not None and self.max_output_tokens > config.limits.max_tokens:
            message = f"max_output_tokens: {self.max_output_tokens} is above {config.limits.max_tokens}; give fewer"
            raise WireError(400, message, param="max_output_tokens")
        return self._chat.make_job(id, config, tenant)

    def _to_chat(self) -> dict[str, Any]:
        given = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else make_messages(self.input)
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return {
            "model": self.model, "messages": [*first, *given], "tools": [tool.to_chat() for tool in self.tools or ()],
            "tool_choice": self._choose(), "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._format(), "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature, "top_p": self.top_p, "logprobs": self.has_logprobs,
            "top_logprobs": self.top_logprobs, "seed": self.seed, "structured_outputs": self.structured_outputs,
        }  # fmt: skip

    def _choose(self) -> Any:
        match self.tool_choice:
            case FlatToolName(name=name):
                return {"type": "function", "function": {"name": name}}
            case FlatAllowedTools(mode=mode, tools=tools):
                named = [{"type": "function", "function": {"name": tool.name}} for tool in tools]
                return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
        return self.tool_choice

    def _format(self) -> dict[str, Any] | None:
        asked = None if self.text is None else self.text.format
        if isinstance(asked, FlatSchema):
            return {"type": "json_schema", "json_schema": {"name": asked.name, "schema": json.loads(asked.text)}}
        return None if asked is None else {"type": asked.type}
