"""The tokens of a text or a conversation, and the text of tokens: what an endpoint answers without an engine's step."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from rankloom.engine.protocol import ChatPrompt, Engine


@dataclass(frozen=True)
class TokenizeJob:
    """What is to become tokens."""

    prompt: str | ChatPrompt
    begins: bool = True
    """Whether a text begins a prompt, and gets the token that some tokenizers put there."""


@dataclass(frozen=True)
class Tokens:
    """A prompt's tokens: their ids, and their names in the tokenizer's vocabulary."""

    ids: tuple[int, ...]
    names: tuple[str, ...]


async def tokenize(engine: Engine, job: TokenizeJob) -> Tokens:
    """Return a job's tokens. A thread finds them. Raises RequestError as `Engine.open_chat` does."""

    def find() -> Tokens:
        if isinstance(job.prompt, ChatPrompt):
            ids = engine.open_chat(job.prompt, None).tokens
        else:
            ids = engine.tokenize(job.prompt, begins=job.begins)
        return Tokens(tuple(ids), tuple(engine.name_tokens(ids)))

    return await asyncio.to_thread(find)


async def detokenize(engine: Engine, tokens: tuple[int, ...]) -> str:
    """Return the text of tokens, special ones included. Raises RequestError for a token that is not known."""
    return await asyncio.to_thread(engine.detokenize, tokens)
