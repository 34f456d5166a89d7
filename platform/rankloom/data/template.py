"""A chat template that must show all it is given: no message's text is lost on the way to the prompt.

Templates differ in what they take: a text or a list of parts as content, a system message or none, a call's arguments
as a mapping or as JSON. `ChatTemplate.find_form` returns the form that shows every message, in training
and serving alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""role and content (a text, perhaps empty), and other keys that the template may read, such as tool_calls and name."""
KEPT_FORMS = 1024
"""Number of conversation shapes whose form is cached."""
LONGEST_SHAPE = 64
"""Most messages of a shape that is cached."""
THINKING_ENDS = "</think>"
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold its thinking; transformers passes a template the one that it reads."""


class TemplateError(ValueError):
    """The template refuses the messages, or leaves out what they say."""


@dataclass(frozen=True)
class Form:
    """The form in which messages are given to the template."""

    parts: Literal["none", "all", "turns"] = "none"
    """Messages whose content is a list of parts; turns: all but the system's."""
    merged: bool = False
    """Whether system messages are merged into the user's turn after them."""
    json_arguments: bool = False
    """Whether a call's arguments are JSON text instead of a mapping."""
    filled: bool = False
    """Whether a turn with only calls has an empty content instead of none."""

    def convert(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages in this form."""
        given = merge_system(messages) if self.merged else list(messages)
        return [self._render_one(message) for message in given]

    def _render_one(self, message: Message) -> Message:
        message = dict(message)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [self._call(call) for call in calls]
        if calls and not message["content"]:
            message["content"] = "" if self.filled else None  # the template sees None as a missing key
        elif self.parts == "all" or (self.parts == "turns" and message["role"] != "system"):
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        if self.json_arguments:
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": function}


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._forms: dict[Any, Form | TemplateError] = {}
        # most templates take a text; some need a list of parts and show nothing of a text
        mark = "a-message"
        ask = [{"role": "user", "content": mark}]
        wants_parts = not self._probe(ask, Form(), mark) and self._probe(ask, Form("all"), mark)
        self._parts: tuple[Literal["none", "all", "turns"], ...] = ("all", "turns") if wants_parts else ("none",)
        talk = [{"role": "system", "content": mark}, {"role": "user", "content": "a"}]
        self._takes_system = any(self._probe(talk, Form(parts), mark) for parts in self._parts)
        self._calls = self._find_form_of_calls(Form(self._parts[0]))

    def render_prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        """Return the prompt for the assistant's next turn.

        Raises:
            TemplateError: the template refuses the messages, or leaves out the text of one.
        """
        text = self.render(messages, self.find_form(messages, tools), tools=tools, ask=True)
        if (lost := _find_lost(messages, text)) is not None:
            raise _make_left_out_error(messages, lost)
        return text

    def find_form(self, messages: Sequence[Message], tools: Any = None) -> Form:
        """Return the form that shows all of such messages; it depends on their roles and keys, not on their texts.

        Raises:
            TemplateError: no form does.
        """
        shape = (
            *((m["role"], bool(m["content"].strip()), len(m.get("tool_calls", ())), *sorted(m)) for m in messages),
            bool(tools),
        )
        form = self._forms.get(shape) or self._find(messages, tools)
        if len(self._forms) < KEPT_FORMS and len(messages) <= LONGEST_SHAPE:
            self._forms[shape] = form
        if isinstance(form, TemplateError):
            raise form
        return form

    def render(self, messages: Sequence[Message], form: Form, *, tools: Any = None, ask: bool = False) -> str:
        """Return the template's text.

        Raises:
            TemplateError: the template refuses the messages.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                form.convert(messages), tools=tools, tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # a template is a program and can fail in any way
            roles = ", ".join(str(m["role"]) for m in messages[:20]) + (", ..." if len(messages) > 20 else "")
            raise TemplateError(f"the chat template refuses the roles {roles}: {_find_reason(error)}") from None
        return str(text)

    def _find(self, messages: Sequence[Message], tools: Any) -> Form | TemplateError:
        # a text or a call's name can be in the prompt by chance, as part of another; these marks can't
        marked = [_mark_message(message, f"message-{i}-") for i, message in enumerate(messages)]
        reason: TemplateError | None = None
        for form in self._list_candidates(messages):
            try:
                text = self.render(marked, form, tools=tools, ask=True)
            except TemplateError as error:
                reason = reason or error
                continue
            lost = _find_lost(marked, text)
            if lost is None:
                return form
            reason = reason or _make_left_out_error(messages, lost)
        assert reason is not None
        return reason

    def _list_candidates(self, messages: Sequence[Message]) -> list[Form]:
        """Return the forms to try, the likeliest first."""
        has_system = any(m["role"] == "system" for m in messages)
        parts = self._parts if has_system else self._parts[:1]
        merged = ([False, True] if self._takes_system else [True, False]) if has_system else [False]
        return [replace(self._calls, merged=m, parts=p) for m, p in product(merged, parts)]

    def _find_form_of_calls(self, plain: Form) -> Form:
        """Find the form for calls; most templates take the arguments as a mapping and write the JSON themselves."""
        function = {"name": "f", "arguments": {"of": "a"}}
        call = {"type": "function", "id": "123456789", "function": function}
        turn: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        talk: list[Message] = [{"role": "user", "content": "a"}, turn]
        usable = None
        for as_json, filled in product([False, True], [False, True]):
            form = replace(plain, json_arguments=as_json, filled=filled)
            try:
                text = self.render(talk, form)
            except TemplateError:
                continue
            if _find_lost(talk, text) is None and str(function["arguments"]) not in text:  # not as Python writes it
                return form
            usable = usable or form
        return usable or plain

    def _probe(self, messages: Sequence[Message], form: Form, mark: str) -> bool:
        try:
            return mark in self.render(messages, form)
        except TemplateError:
            return False


def merge_system(messages: Sequence[Message]) -> list[Message]:
    """Put each system text at the start of the user's turn after it, for templates without a system role."""
    merged: list[Message] = []
    for message in messages:
        texts: list[str] = []
        while message["role"] == "user" and merged and merged[-1]["role"] == "system":
            texts.insert(0, merged.pop()["content"])
        merged.append({**message, "content": "\n\n".join([*texts, message["content"]])} if texts else message)
    return merged


def _mark_message(message: Message, mark: str) -> Message:
    """Return a message of equal shape whose texts occur nowhere else."""
    marked = {**message, "content": mark if message["content"].strip() else ""}
    if calls := message.get("tool_calls"):
        names = (f"{mark}{i}-" for i in range(len(calls)))
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": name}} for call, name in zip(calls, names, strict=True)
        ]
    return marked


def collect_required_text(message: Message) -> str:
    """Return the text that a template must show of a message in the history; templates drop its thinking by design."""
    content = str(message["content"] or "")
    if message["role"] == "assistant":
        content = content.rpartition(THINKING_ENDS)[2]
    return content.strip()


def shows_answer(message: Message, text: str) -> bool:
    """Return whether `text` shows all of a trained turn of the assistant, its thinking included."""
    thinking, _, answer = str(message["content"]).rpartition(THINKING_ENDS)
    return (
        thinking.replace("<think>", "").strip() in text and _find_lost([{**message, "content": answer}], text) is None
    )


def _find_lost(messages: Sequence[Message], text: str) -> int | None:
    """Return the index of the first message of which something is missing in a prompt; None: nothing is missing."""
    at = 0
    for i, message in enumerate(messages):
        names = [str(call["function"]["name"]) for call in message.get("tool_calls") or ()]
        for part in filter(None, [collect_required_text(message), *names]):
            found = _find(text, part, at)
            if found < 0 and (found := _find(text, part, 0)) < 0:
                return i
            if found >= at and message["role"] != "system":  # some templates move the system's text
                at = found
    return None


def _find(text: str, part: str, start: int) -> int:
    """Return where a text is, as given or as JSON, which some templates write for a tool's result; -1: nowhere."""
    found = text.find(part, start)
    for ascii in (False, True) if found < 0 else ():
        escaped = json.dumps(part, ensure_ascii=ascii)[1:-1]
        if found < 0 and escaped != part:
            found = text.find(escaped, start)
    return found


def _make_left_out_error(messages: Sequence[Message], index: int) -> TemplateError:
    message = messages[index]
    what = "a call" if message.get("tool_calls") and not message["content"] else "the text"
    return TemplateError(f"the chat template leaves out {what} of message {index + 1} (role {message['role']!r})")


def _find_reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no details"
    return text if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: {text}"
