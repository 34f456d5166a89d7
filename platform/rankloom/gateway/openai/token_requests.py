"""The bodies of `/tokenize` and `/detokenize`, with vLLM's keys."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rankloom.engine.protocol import ChatPrompt
from rankloom.engine.tokens import TokenizeJob
from rankloom.gateway.openai.body import Body, Off, On, Text, limit_keys
from rankloom.gateway.openai.errors import WireError
from rankloom.gateway.openai.messages import Messages
from rankloom.gateway.openai.prompts import Token
from rankloom.gateway.openai.tools import Tools

ModelOrBase = Annotated[Text, Field(max_length=512)] | None


class TokenizeRequest(Body):
    """`POST /tokenize`: either a prompt or messages."""

    model: ModelOrBase = None
    """As in a completion; null: the base. All of an endpoint's models have one tokenizer."""
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    """As in a chat."""
    add_special_tokens: bool | None = None
    """Whether a prompt begins with the token that some tokenizers put there; null: it does."""
    return_token_strs: bool | None = None
    """Return the tokens' names too."""
    add_generation_prompt: On | None = None
    continue_final_message: Off | None = None
    chat_template: None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=0), limit_keys(0)] | None = None
    mm_processor_kwargs: None = None

    def make_job(self) -> TokenizeJob:
        """Make a job. Raises WireError unless there is one thing to tokenise."""
        if (self.prompt is None) == (self.messages is None):
            raise WireError(400, "prompt: give either prompt or messages.", param="prompt")
        if self.prompt is not None:
            if self.tools:
                raise WireError(400, "tools: only with messages.", param="tools")
            return TokenizeJob(self.prompt, begins=self.add_special_tokens is not False)
        if self.add_special_tokens:
            raise WireError(
                400, "add_special_tokens: a chat template writes them itself; leave it out", param="add_special_tokens"
            )
        messages = tuple(message.to_template() for message in self.messages or ())
        return TokenizeJob(ChatPrompt(messages, tuple(tool.to_template() for tool in self.tools or ())))


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: ModelOrBase = None
    """As in a completion; null: the base."""
    tokens: Annotated[list[Token], Field(fail_fast=True)]
