"""Reads a source's rows as conversations, and renders these as text, in pieces with loss and pieces without.

Every format becomes messages, and messages become text through the tokenizer's chat template, or through the plain
template: contents on lines of their own, the end token after each completion.

render.py makes tokens of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankloom.config.data import CONTEXT, DataConfig
from rankloom.data.encode import Encoder
from rankloom.data.messages import read_messages, read_tools, to_text
from rankloom.data.template import THOUGHTS, ChatTemplate, Form, Message, TemplateError, shows_answer
from rankloom.errors import ConfigError, DataError

PREVIEW_LENGTH = 80
LINKS = {"role", "content", "tool_calls", "tool_call_id", "id"}
"""Keys of a message that need no warning if the template does not show them."""
SPOKEN = {"tool_calls", *THOUGHTS}
"""Keys that give a turn without content something to say."""


@dataclass(frozen=True)
class Piece:
    """A part of a row's text that is tokenised separately."""

    text: str
    trained: bool
    ended: bool = False
    """Whether the end token must follow."""
    muted: bool = False
    """Whether it carries no loss even with `train_on=all`: a turn of weight 0."""


@dataclass(frozen=True)
class Conversation:
    """A row's text: what precedes the completion, and the completion."""

    pieces: list[Piece]
    completion: str
    """As given, without the template's additions."""
    preview: str
    skipped_turns: int = 0
    """Earlier assistant turns without loss, because the template renders them differently in the history."""
    notes: tuple[str, ...] = ()
    """What is not trained as given, each note a predicate of the row."""

    @property
    def prompt(self) -> str:
        return "".join(piece.text for piece in self.pieces[:-1])


class ConversationReader:
    """Reads rows of one format.

    Args:
        format: one of `COLUMNS`, not auto.
        label_names: the names of integer labels, if the source has them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        format: str,
        label_names: Sequence[str] | None = None,
    ) -> None:
        self.tokenizer, self.config, self.label_names = tokenizer, config, label_names
        self.read: Callable[[dict[str, Any], str], Conversation | None] = {
            "chat": self._from_chat,
            "instruction": lambda row, name: self._from_pair(row, name, "instruction", "response"),
            "completion": lambda row, name: self._from_pair(row, name, "prompt", "completion"),
            "classification": self._from_labelled,
            "text": self._from_text,
        }[format]
        """Return the conversation of a row, named for errors; None: it has nothing to train on."""
        chat = uses_chat_template(config, tokenizer, format)
        self.encoder = Encoder(tokenizer, config.split_special_tokens and chat)
        self.template = ChatTemplate(tokenizer) if chat else None
        self._shown: set[str] = set()
        """Parts of a row that the template is known to show."""

    def read_label(self, value: Any, name: str) -> str:
        """Return a label as text; an integer is an index of `label_names`, where there are any."""
        if isinstance(value, int) and self.label_names is not None:
            return self.label_names[value] if 0 <= value < len(self.label_names) else ""  # -1: no label
        return to_text(value, name, "label")

    def render_label(self, label: str) -> Conversation:
        """Render a conversation whose completion is the label."""
        return self._render([_make_message("user", "a"), _make_message("assistant", label)], label)

    def _from_pair(self, row: dict[str, Any], name: str, asked: str, answered: str) -> Conversation | None:
        prompt, completion = row[asked], row[answered]
        if _is_talk(prompt) or _is_talk(completion):  # TRL's conversational rows, which train only the completion
            before = (
                read_messages(prompt, name, asked)
                if _is_talk(prompt)
                else [_make_message("user", to_text(prompt, name, asked))]
            )
            if self.config.train_on == "completion":
                before = [m | {"weight": 0} if m["role"] == "assistant" else m for m in before]
            after = completion if _is_talk(completion) else [{"role": "assistant", "content": completion}]
            return self._from_messages([*before, *read_messages(after, name, answered)], row, name)
        prompt, completion = to_text(prompt, name, asked), to_text(completion, name, answered)
        extra = [each for column in CONTEXT if (each := to_text(row.get(column), name, column)).strip()]
        if not prompt.strip() or not completion.strip():
            return None
        prompt = "\n\n".join([prompt, *extra])
        return self._from_messages([_make_message("user", prompt), _make_message("assistant", completion)], row, name)

    def _from_labelled(self, row: dict[str, Any], name: str) -> Conversation | None:
        asked, label = to_text(row["text"], name, "text"), self.read_label(row["label"], name)
        return self._from_messages([_make_message("user", asked), _make_message("assistant", label)], row, name)

    def _from_text(self, row: dict[str, Any], name: str) -> Conversation | None:
        given = to_text(row["text"], name, "text")
        if not given.strip():
            return None
        return Conversation([Piece(given, trained=True, ended=True)], given, _shorten(given))

    def _from_chat(self, row: dict[str, Any], name: str) -> Conversation | None:
        given = row["messages"]
        return None if given is None else self._from_messages(read_messages(given, name), row, name)

    def _from_messages(self, messages: list[Message], row: dict[str, Any], name: str) -> Conversation | None:
        # turns after the last trained answer teach nothing
        while messages and (messages[-1]["role"] != "assistant" or "weight" in messages[-1]):
            messages = messages[:-1]
        asked = any(m["role"] != "system" and (m["content"].strip() or m.get("tool_calls")) for m in messages[:-1])
        if not asked or not (messages[-1]["content"].strip() or messages[-1].get("tool_calls")):
            return None
        if (system := to_text(row.get("system"), name, "system")).strip():
            messages = _add_instruction(messages, system)
        silent = [m["role"] == "assistant" and not (m["content"].strip() or m.keys() & SPOKEN) for m in messages]
        if not any(silent) or self.config.train_on == "all":
            return self._render(messages, name, read_tools(row.get("tools"), name))
        # with loss, they would teach the model to say nothing
        messages = [m | {"weight": 0} if empty else m for m, empty in zip(messages, silent, strict=True)]
        rendered = self._render(messages, name, read_tools(row.get("tools"), name))
        return replace(
            rendered, notes=(*rendered.notes, "have a turn of the assistant without text, which carries no loss")
        )

    def _render(self, messages: list[Message], name: str, tools: list[Any] | None = None) -> Conversation:
        if self.config.instruction:
            messages = _add_instruction(messages, self.config.instruction)
        if self.template is None:
            return self._render_plain(messages, name, tools)
        try:
            return self._render_chat(messages, name, tools, self.template)
        except TemplateError as error:
            raise DataError(f"{name}: {self.encoder.unmark(str(error))}; try {_suggest_fix(messages)}") from None

    def _render_plain(self, messages: list[Message], name: str, tools: list[Any] | None) -> Conversation:
        if any(m.get("tool_calls") for m in messages):
            raise DataError(
                f"{name}: only a chat template can render tool_calls: use a model that has one, with data.template=auto"
            )
        if self.config.train_on == "all" and any("weight" in m for m in messages if m["role"] != "assistant"):
            raise DataError(
                f"{name}: without a chat template only the assistant's turns can have weight 0; use "
                f"data.train_on=completion"
            )
        pieces: list[Piece] = []
        prompt = ""
        for message in messages:
            content = self.encoder.mark(message["content"])
            if message["role"] == "assistant" and (prompt or pieces):
                muted = "weight" in message
                pieces += [Piece(prompt, trained=False), Piece(content, trained=not muted, ended=True, muted=muted)]
                prompt = ""
            else:
                prompt += f"{content}\n"
        unread = sorted({key for m in messages for key in m} - LINKS - {"weight"})
        notes = self._collect_notes(*(piece.text for piece in pieces), unread=unread + ["tools"] * bool(tools))
        return Conversation(pieces, messages[-1]["content"], _shorten(messages[-2]["content"]), 0, notes)

    def _render_chat(
        self, given: list[Message], name: str, tools: list[Any] | None, template: ChatTemplate
    ) -> Conversation:
        weighted = ["weight" not in m for m in given]
        messages = self.encoder.mark([{key: m[key] for key in m if key != "weight"} for m in given])
        tools = self.encoder.mark(tools)
        form, prompt = template.find_form(messages[:-1], tools), template.render_prompt(messages[:-1], tools)

        def render(messages: list[Message], ask: bool = False) -> str:
            return template.render(messages, form, tools=tools, ask=ask)

        whole, pieces, skipped = render(messages), list[Piece](), 0
        done = 0  # characters of `whole` that are in `pieces`
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0]
        for i in turns[:-1]:
            before = render(messages[:i], ask=True)
            after = render(messages[: i + 1]).rstrip()
            if done <= len(before) < len(after) and whole.startswith(before) and whole.startswith(after):
                turn = Piece(after[len(before) :], trained=weighted[i], muted=not weighted[i])
                pieces += [Piece(whole[done : len(before)], trained=False), turn]
                done = len(after)
            else:
                skipped += weighted[i]
        answer = messages[-1]
        if not prompt.startswith(whole[:done]):  # the last turn's prompt rewrites history: train only that turn
            pieces, done, skipped = [], 0, sum(weighted[i] for i in turns[:-1])
        content = answer["content"].strip()
        start = len(prompt)
        if not whole.startswith(prompt):  # the prompt opens a part that the turn lacks, such as thinking
            shared = next((i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), len(whole))
            start = whole.rfind(content) if content else shared if not prompt[shared:].strip() else -1
        # a line break after the end of the turn is never generated
        completion = whole[start:].rstrip()
        if start < 0 or not shows_answer(answer, completion):
            raise DataError(
                f"{name}: the tokenizer's chat template drops the completion, or a part of it: "
                f"{given[-1]['content'][:60] or 'a call'!r}; change the row, or try {_suggest_fix(given)}"
            )
        if self.config.train_on == "all" and sum(piece.muted for piece in pieces) < weighted.count(False):
            raise DataError(
                f"{name}: a turn of weight 0 can't be separated from the text that the chat template adds to it; use "
                f"data.train_on=completion"
            )
        pieces += [Piece(prompt[done:], trained=False), Piece(completion, trained=True, ended=True)]
        unread = self._find_unread(messages, tools, form, whole)
        for key in THOUGHTS:
            if str(answer.get(key) or "").strip() not in completion and f"messages.{key}" not in unread:
                unread.append(f"messages.{key}")  # the prompt has closed the thinking already
        notes = self._collect_notes(whole, unread=unread)
        said = self._strip_end(completion) if answer.get("tool_calls") else given[-1]["content"]
        return Conversation(pieces, said, _shorten(given[-2]["content"]), skipped, notes)

    def _find_unread(self, messages: list[Message], tools: list[Any] | None, form: Form, whole: str) -> list[str]:
        """Return the keys of the messages, and `tools`, that the template does not show."""
        assert self.template is not None
        without: dict[str, Any] = {
            f"messages.{key}": [{name: value for name, value in m.items() if name != key} for m in messages]
            for key in sorted({key for m in messages for key in m} - LINKS)
        }
        if any(call["function"]["arguments"] for m in messages for call in m.get("tool_calls") or ()):
            without["messages.tool_calls.arguments"] = [_strip_arguments(m) for m in messages]
        if tools:
            without["tools"] = messages
        unread: list[str] = []
        for what, bare in without.items():
            if what not in self._shown:
                kept = None if what == "tools" else tools
                shows = self.template.render(bare, form, tools=kept) != whole
                (self._shown.add if shows else unread.append)(what)
        return unread

    def _collect_notes(self, *texts: str, unread: Sequence[str] = ()) -> tuple[str, ...]:
        notes = [f"have {key}, which is not rendered" for key in unread]
        if any(map(self.encoder.is_marked, texts)):
            notes.append("hold special tokens, which are kept as text (data.split_special_tokens)")
        return tuple(notes)

    def _strip_end(self, completion: str) -> str:
        """Return a rendered turn without the special token that ends it."""
        ends = self.tokenizer.convert_ids_to_tokens(list(self.encoder.special))
        end = next((str(token) for token in ends if completion.endswith(str(token))), "")
        return self.encoder.unmark(completion.removesuffix(end))


def uses_chat_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase, format: str) -> bool:
    """Return whether rows go through the chat template.

    Raises:
        DataError: the settings ask for a chat template, but the tokenizer has none.
        ConfigError: the format does not use a template.
    """
    if format == "text":
        for name, value in (("template", config.template == "chat"), ("instruction", config.instruction)):
            if value:
                raise ConfigError(
                    f"data.{name}: {getattr(config, name)!r} does not apply to the format text; remove it"
                )
        return False
    has_template = tokenizer.chat_template is not None
    if config.template == "chat" and not has_template:
        raise DataError("data.template: chat, but the model's tokenizer has no chat template; use auto or plain")
    return has_template and config.template != "plain"


def _is_talk(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _suggest_fix(messages: Sequence[Message]) -> str:
    """Return what to try if the template does not show a conversation; the plain template shows no calls."""
    plain = [] if any(m.get("tool_calls") for m in messages) else ["data.template=plain"]
    return " or ".join([*plain, "a model whose template shows all of it"])


def _strip_arguments(message: Message) -> Message:
    calls = [call | {"function": call["function"] | {"arguments": {}}} for call in message.get("tool_calls") or ()]
    return message | {"tool_calls": calls} if calls else message


def _make_message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _add_instruction(messages: list[Message], instruction: str) -> list[Message]:
    if messages[0]["role"] == "system":
        return [_make_message("system", f"{instruction}\n\n{messages[0]['content']}"), *messages[1:]]
    return [_make_message("system", instruction), *messages]


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= PREVIEW_LENGTH else f"{line[: PREVIEW_LENGTH - 1]}…"
