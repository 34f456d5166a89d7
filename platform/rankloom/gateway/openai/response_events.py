"""The response to `/v1/responses`, whole or as a stream of events, made of an engine's deltas.

Both are one walk over the deltas: each event changes the response, and the last one holds it whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from rankloom.engine.jobs import JobProgress
from rankloom.engine.protocol import CallDelta, Delta
from rankloom.gateway.openai.errors import WireError
from rankloom.gateway.openai.response_request import ResponseRequest
from rankloom.gateway.openai.responses import PART, format_logprobs, iter_json

_PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
Event = dict[str, Any]


@dataclass
class _Item:
    """An item of the output, as far as it is known."""

    kind: Literal["message", "reasoning", "function_call"]
    id: str
    index: int
    text: str = ""
    """The content, the thoughts or a call's arguments."""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    call_id: str = ""
    name: str = ""
    status: str = "in_progress"

    def to_json(self, *, empty: bool = False) -> dict[str, Any]:
        """Return the item; `empty`: as it began, without its text."""
        head: dict[str, Any] = {"id": self.id, "type": self.kind, "status": self.status}
        parts = [] if empty else [self.make_part()]
        match self.kind:
            case "message":
                return head | {"role": "assistant", "content": parts}
            case "reasoning":
                return head | {"summary": [], "content": parts}
        return head | {"call_id": self.call_id, "name": self.name, "arguments": "" if empty else self.text}

    def make_part(self, *, empty: bool = False) -> dict[str, Any]:
        text = "" if empty else self.text
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": [] if empty else self.logprobs}


class ResponseWriter:
    """Writes one response."""

    def __init__(self, body: ResponseRequest, number: str, created: int) -> None:
        """
        Args:
            number: what its ids have in common.
            created: seconds since 1970.
        """
        self._body, self._number = body, number
        self._items: list[_Item] = []
        self._num_events = 0
        self._usage: dict[str, Any] | None = None
        self._prompt_tokens = self._tokens = self._thinking_tokens = self._cached_tokens = 0
        self._head = _describe_request(body) | {"id": f"resp_{number}", "object": "response", "created_at": created}
        self._state: dict[str, Any] = {"status": "in_progress", "error": None, "incomplete_details": None}
        self.length = 0
        """Characters of `iter_body`, about."""

    def add(self, progress: JobProgress) -> None:
        """Add progress for `iter_body`."""
        for _ in self._make_events(progress):
            pass

    def iter_body(self) -> Iterator[str]:
        """Yield the body of a response that is not streamed, as JSON in parts."""
        yield from self._encode(self._to_json())

    def begin(self) -> Iterator[bytes]:
        """Yield the events before the first tokens."""
        for kind in ("response.created", "response.in_progress"):
            yield from self._format([self._make_event(kind, response=self._to_json())])

    def write(self, progress: JobProgress) -> Iterator[bytes]:
        """Yield the events of new progress, in parts."""
        yield from self._format(self._make_events(progress))

    def end(self) -> Iterator[bytes]:
        """Yield nothing: the last progress has brought the last event."""
        yield from ()

    def fail(self, error: WireError) -> Iterator[bytes]:
        """Yield the event of a response that ended in the middle."""
        self._state |= {"status": "failed", "error": {"code": "server_error", "message": error.message}}
        yield from self._format([self._make_event("response.failed", response=self._to_json())])

    def _make_events(self, progress: JobProgress) -> Iterator[Event]:
        self._prompt_tokens = progress.prompt_tokens
        for _, delta in progress.deltas:
            self._count(delta)
            if delta.thinking:
                yield from self._say("reasoning", delta.thinking, delta)
            if delta.text or (delta.logprobs and self._body.has_logprobs):
                yield from self._say("message", delta.text, delta)
            for call in delta.calls:
                yield from self._call(call)
            if delta.finish is not None:
                yield from self._finish(delta.finish)

    def _count(self, delta: Delta) -> None:
        self._tokens += len(delta.tokens)
        self._cached_tokens = delta.cached_tokens
        if delta.thinking and not delta.text and not delta.calls:
            self._thinking_tokens += len(delta.tokens)
        self.length += len(delta.text) + len(delta.thinking) + sum(len(call.arguments) for call in delta.calls)

    def _say(self, kind: Literal["message", "reasoning"], text: str, delta: Delta) -> Iterator[Event]:
        if not self._items or self._items[-1].kind != kind or self._items[-1].status != "in_progress":
            yield from self._close()
            yield from self._open(kind)
        item = self._items[-1]
        item.text += text
        facts: dict[str, Any] = {"item_id": item.id, "output_index": item.index, "content_index": 0, "delta": text}
        if kind == "reasoning":
            yield self._make_event("response.reasoning_text.delta", **facts)
            return
        logprobs = format_logprobs(delta.logprobs) if self._body.has_logprobs else []
        item.logprobs += logprobs
        self.length += 100 * sum(1 + len(each["top_logprobs"]) for each in logprobs)
        yield self._make_event("response.output_text.delta", **facts, logprobs=logprobs)

    def _call(self, call: CallDelta) -> Iterator[Event]:
        if call.id is not None:
            yield from self._close()
            yield from self._open("function_call", call_id=call.id, name=call.name or "")
        item = self._items[-1]
        if call.arguments:
            item.text += call.arguments
            facts = {"item_id": item.id, "output_index": item.index, "delta": call.arguments}
            yield self._make_event("response.function_call_arguments.delta", **facts)

    def _open(self, kind: Literal["message", "reasoning", "function_call"], **facts: str) -> Iterator[Event]:
        index = len(self._items)
        item = _Item(kind, f"{_PREFIX[kind]}_{self._number}_{index}", index, **facts)  # type: ignore[arg-type]
        self._items.append(item)
        yield self._make_event("response.output_item.added", output_index=index, item=item.to_json(empty=True))
        if kind != "function_call":
            yield self._make_event(
                "response.content_part.added", item_id=item.id, output_index=index, content_index=0,
                part=item.make_part(empty=True),
            )  # fmt: skip

    def _close(self, status: str = "completed") -> Iterator[Event]:
        """End the item that is open, if one is."""
        if not self._items or self._items[-1].status != "in_progress":
            return
        item = self._items[-1]
        item.status = status
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        if item.kind == "function_call":
            done = {"arguments": item.text, "name": item.name}
            yield self._make_event("response.function_call_arguments.done", **place, **done)
        else:
            place |= {"content_index": 0}
            part = item.make_part()
            more = {"logprobs": item.logprobs} if item.kind == "message" else {}
            yield self._make_event(f"response.{part['type']}.done", **place, text=item.text, **more)
            yield self._make_event("response.content_part.done", **place, part=part)
        yield self._make_event("response.output_item.done", output_index=item.index, item=item.to_json())

    def _finish(self, finish: str) -> Iterator[Event]:
        is_whole = finish != "length"
        if not any(item.kind != "reasoning" for item in self._items) and is_whole:
            yield from self._close()
            yield from self._open("message")
        yield from self._close("completed" if is_whole else "incomplete")
        self._usage = {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": self._cached_tokens, "cache_write_tokens": 0},
            "output_tokens": self._tokens,
            "output_tokens_details": {"reasoning_tokens": self._thinking_tokens},
            "total_tokens": self._prompt_tokens + self._tokens,
        }
        self._state["status"] = "completed" if is_whole else "incomplete"
        self._state["incomplete_details"] = None if is_whole else {"reason": "max_output_tokens"}
        yield self._make_event(f"response.{self._state['status']}", response=self._to_json())

    def _to_json(self) -> dict[str, Any]:
        return self._head | self._state | {"output": [item.to_json() for item in self._items], "usage": self._usage}

    def _make_event(self, kind: str, **facts: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1} | facts

    def _format(self, events: Iterable[Event]) -> Iterator[bytes]:
        """Yield server-sent events, a large one in parts."""
        for event in events:
            yield f"event: {event['type']}\ndata: ".encode()
            for part in self._encode(event):
                yield part.encode()
            yield b"\n\n"

    def _encode(self, value: dict[str, Any]) -> Iterator[str]:
        return iter([json.dumps(value)]) if self.length < PART else iter_json(value)


def _describe_request(body: ResponseRequest) -> dict[str, Any]:
    """Return what a response repeats of its request."""
    given = body.model_dump(by_alias=True, exclude_none=True, exclude={"input"})
    asked = body.text and body.text.format
    form = given["text"]["format"] if asked else {"type": "text"}
    if isinstance(form.get("schema"), str):
        form = form | {"schema": json.loads(form["schema"])}
    keys = ("instructions", "max_output_tokens", "max_tool_calls", "temperature", "top_p", "user", "prompt_cache_key")
    return {key: given.get(key) for key in (*keys, "safety_identifier")} | {
        "model": body.model,
        "metadata": given.get("metadata", {}),
        "tools": [{"parameters": None, "strict": None, **tool} for tool in given.get("tools", [])],
        "tool_choice": given.get("tool_choice", "auto"),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": form, "verbosity": "medium"},
        "reasoning": {"effort": None, "summary": None},
        "top_logprobs": body.top_logprobs or 0,
        "truncation": "disabled",
        "store": False,
        "background": False,
        "previous_response_id": None,
        "service_tier": "default",
    }
