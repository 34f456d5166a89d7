"""OpenAI's responses: whole bodies and the chunks of a stream, made of an engine's deltas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rankloom.engine.jobs import JobProgress
from rankloom.engine.protocol import CallDelta, Delta, Likelihood, TokenLogprobs
from rankloom.engine.text_offset import TextOffset
from rankloom.gateway.openai.errors import WireError

PART = 2**16
"""Characters of JSON that are encoded at once."""
Kind = Literal["chat", "text"]
_PREFIX = {"chat": "chatcmpl", "text": "cmpl"}
_OBJECT = {"chat": "chat.completion", "text": "text_completion"}


def make_response_id(kind: Kind, number: str) -> str:
    return f"{_PREFIX[kind]}-{number}"


@dataclass
class _Completion:
    """One completion as far as it is known."""

    text: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    likelihoods: dict[str, list[str]] = field(default_factory=dict)
    """As OpenAI writes them, as JSON: there may be a million, which are not to be written all at once in the end."""
    finish: str | None = None
    begun: bool = False
    """Whether a chunk of it was sent."""
    place: TextOffset = field(default_factory=TextOffset)
    """The position of the logprobs that were written."""


class ResponseBuilder:
    """The response to one request, gathered or in chunks."""

    def __init__(
        self, kind: Kind, id: str, model: str, created: int, count: int, *, n: int, logprobs: bool, usage: bool = False
    ) -> None:
        """
        Args:
            count: completions, of all prompts.
            n: completions of each prompt.
            created: seconds since 1970.
            logprobs: whether the request asks for them.
            usage: whether a stream ends with it.
        """
        self._kind = kind
        self._head: dict[str, Any] = {"id": id, "object": _OBJECT[kind], "created": created, "model": model}
        self._completions = [_Completion() for _ in range(count)]
        self._n, self._usage = n, usage
        self._logprobs = logprobs
        self._cached: dict[int, int] = {}
        self._refusal: dict[str, None] = {"refusal": None} if kind == "chat" else {}
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.length = 0
        """Characters of `iter_body`, about."""

    def add(self, progress: JobProgress) -> None:
        """Add progress for `iter_body`."""
        for index, delta in progress.deltas:
            each = self._count(progress, index, delta)
            each.text += delta.text
            each.thinking += delta.thinking
            for call in delta.calls:
                if call.id is not None:
                    each.calls.append({"id": call.id, "type": "function", "function": _format_function(call)})
                else:
                    each.calls[call.index]["function"]["arguments"] += call.arguments
            self.length += len(delta.text) + len(delta.thinking) + sum(len(call.arguments) for call in delta.calls)
            if self._logprobs:
                for key, values in self._format_likelihoods(delta.logprobs, each.place).items():
                    written = [json.dumps(value) for value in values]
                    each.likelihoods.setdefault(key, []).extend(written)
                    self.length += sum(map(len, written))

    def _count(self, progress: JobProgress, index: int, delta: Delta) -> _Completion:
        self.prompt_tokens = progress.prompt_tokens
        self.completion_tokens += len(delta.tokens)
        self._cached[index] = delta.cached_tokens
        each = self._completions[index]
        each.finish = delta.finish or each.finish
        return each

    def make_chunks(self, progress: JobProgress) -> Iterator[dict[str, Any]]:
        """Make the chunks that a stream sends for new progress."""
        for index, delta in progress.deltas:
            each = self._count(progress, index, delta)
            begin, each.begun = not each.begun, True
            if not (begin or delta.text or delta.thinking or delta.calls or delta.logprobs or delta.finish):
                continue
            choice: dict[str, Any] = {"index": index, "logprobs": None}
            if self._logprobs:
                choice["logprobs"] = self._format_likelihoods(delta.logprobs, each.place) | self._refusal
            if self._kind == "chat":
                choice["delta"] = ({"role": "assistant"} if begin else {}) | _format_delta(delta)
            else:
                choice["text"] = delta.text
            yield self._make_chunk([choice | {"finish_reason": delta.finish}])

    def begin(self) -> Iterator[bytes]:
        """Yield the events before the first tokens: none."""
        yield from ()

    def write(self, progress: JobProgress) -> Iterator[bytes]:
        """Yield the events of new progress."""
        if chunks := [format_event(chunk) for chunk in self.make_chunks(progress)]:
            yield b"".join(chunks)

    def end(self) -> Iterator[bytes]:
        """Yield the events of the end."""
        yield (format_event(self.make_usage_chunk()) if self._usage else b"") + DONE

    def fail(self, error: WireError) -> Iterator[bytes]:
        """Yield the event of an error, whose status can't be sent any more."""
        yield format_event(error.make_body())

    def make_usage_chunk(self) -> dict[str, Any]:
        """Make the last chunk of a stream with `include_usage`."""
        return self._make_chunk([]) | {"usage": self.count_usage()}

    def iter_body(self) -> Iterator[str]:
        """Yield the body of a response that is not streamed, as JSON in parts."""
        yield json.dumps(self._head)[:-1] + ', "choices": ['
        for index, each in enumerate(self._completions):
            choice: dict[str, Any] = {"index": index, "finish_reason": each.finish}
            if self._kind == "chat":
                content = each.text or (None if each.calls else "")
                choice["message"] = {"role": "assistant", "content": content, "refusal": None}
                choice["message"] |= {"reasoning_content": each.thinking} if each.thinking else {}
                choice["message"] |= {"tool_calls": each.calls} if each.calls else {}
            else:
                choice["text"] = each.text
            yield (", " if index else "") + json.dumps(choice)[:-1] + ', "logprobs": '
            if self._logprobs:
                lists = [f'"{key}": [{", ".join(values)}]' for key, values in each.likelihoods.items()]
                yield "{" + ", ".join([*lists, *(f'"{key}": null' for key in self._refusal)]) + "}"
            else:
                yield "null"
            yield "}"
        yield f'], "usage": {json.dumps(self.count_usage())}}}'

    def count_usage(self) -> dict[str, Any]:
        # further completions of a prompt find it in the cache; what counts is what the first one did
        cached = sum(self._cached.get(index, 0) for index in range(0, len(self._completions), self._n))
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _make_chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        suffix = ".chunk" if self._kind == "chat" else ""
        return self._head | {"object": self._head["object"] + suffix, "choices": choices}

    def _format_likelihoods(self, tokens: Sequence[TokenLogprobs], place: TextOffset) -> dict[str, list[Any]]:
        if self._kind == "chat":
            return {"content": format_logprobs(tokens)}
        return {
            "tokens": [_decode_text(t.chosen) for t in tokens],
            "token_logprobs": [t.chosen.logprob for t in tokens],
            "top_logprobs": [_name_likeliest(t) for t in tokens],
            "text_offset": [place.take(t.chosen.piece)[0] for t in tokens],
        }


def format_logprobs(tokens: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """Return tokens' logprobs as chats have them."""
    return [_format_one(t.chosen) | {"top_logprobs": [_format_one(each) for each in t.top]} for t in tokens]


def _format_delta(delta: Delta) -> dict[str, Any]:
    """Return what a chunk says that is new."""
    calls = [
        {"index": call.index, "function": _format_function(call)}
        | ({"id": call.id, "type": "function"} if call.id is not None else {})
        for call in delta.calls
    ]
    said: dict[str, Any] = {"reasoning_content": delta.thinking} if delta.thinking else {}
    said |= {"tool_calls": calls} if calls else {}
    return said | ({"content": delta.text} if delta.text or not said else {})


def _format_function(call: CallDelta) -> dict[str, Any]:
    return ({"name": call.name} if call.name is not None else {}) | {"arguments": call.arguments}


def _decode_text(token: Likelihood) -> str:
    return token.piece.decode("utf-8", "replace") if token.name is None else token.name


def _format_one(token: Likelihood) -> dict[str, Any]:
    return {"token": _decode_text(token), "logprob": token.logprob, "bytes": list(token.piece)}


def _name_likeliest(token: TokenLogprobs) -> dict[str, float | None] | None:
    """Name the likeliest tokens by their texts, or as OpenAI does by bytes where a text is partial or not unique."""
    if token.chosen.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for each in token.top:
        text, spelt = _decode_text(each), "bytes:" + "".join(f"\\x{byte:02x}" for byte in each.piece)
        is_own = text not in (_decode_text(token.chosen), *found) and "\N{REPLACEMENT CHARACTER}" not in text
        names = [text] if each.token == token.chosen.token or is_own else []
        found[next(name for name in (*names, spelt, f"token_id:{each.token}") if name not in found)] = each.logprob
    return found


def iter_json(value: Any) -> Iterator[str]:
    """Yield JSON in parts, each of which takes a short time."""
    pieces, length = list[str](), 0
    for piece in json.JSONEncoder().iterencode(value):
        pieces.append(piece)
        length += len(piece)
        if length >= PART:
            yield "".join(pieces)
            pieces, length = [], 0
    yield "".join(pieces)


def format_event(data: dict[str, Any] | str) -> bytes:
    """Return one server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


DONE = format_event("[DONE]")
