"""ChatFormat: how a base's chat template writes thinking and calls of tools, in prompts and in completions.

`open` turns a conversation into a prompt, the grammar that its answer follows, and a parser for the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rankloom.engine.chat import harmony, thinking, xml_calls
from rankloom.engine.chat.forced import TEXT, CallSyntax, make_speller, write_calls, write_reply, write_text_or_calls
from rankloom.engine.chat.harmony import HarmonyParser
from rankloom.engine.chat.json_calls import JsonCallParser, JsonFormat
from rankloom.engine.chat.pieces import Parser, PlainParser
from rankloom.engine.chat.thinking import ThinkingParser
from rankloom.engine.chat.xml_calls import XmlCallParser, write_parameters
from rankloom.engine.prompts import Prompts
from rankloom.engine.protocol import ChatPrompt, Grammar, OpenChat
from rankloom.errors import RequestError

ToolCallParser = Literal["hermes", "llama3_json", "mistral", "openai", "qwen3_coder"]


@dataclass(frozen=True)
class _Calls:
    syntax: CallSyntax
    make_parser: Callable[[Mapping[str, Mapping[str, Any]]], Parser]
    """Takes the parameters' schema of each tool."""


_HERMES = _Calls(
    CallSyntax("<tool_call>", '\n{"name": "', '", "arguments": ', "}\n</tool_call>", between="\n<tool_call>"),
    partial(JsonCallParser, JsonFormat(("<tool_call>",), close="</tool_call>")),
)
_LLAMA = _Calls(
    CallSyntax("", '{"name": "', '", "parameters": ', "}"),
    partial(JsonCallParser, JsonFormat(("<|python_tag|>",), between=" \n\t\r;", bare=True)),
)
_MISTRAL = _Calls(
    CallSyntax("[TOOL_CALLS]", '{"name": "', '", "arguments": ', "}", first=" [", between=", ", last="]"),
    partial(JsonCallParser, JsonFormat(("[TOOL_CALLS]",), between=" \n\t\r,[]")),
)
_MISTRAL_NAMED = _Calls(
    CallSyntax("[TOOL_CALLS]", "", "[ARGS]", "", between="[TOOL_CALLS]"),
    partial(JsonCallParser, JsonFormat(("[TOOL_CALLS]",), named="[ARGS]")),
)
_HARMONY = _Calls(
    CallSyntax(harmony.CHANNEL, "commentary to=functions.", f" {harmony.CONSTRAIN}json{harmony.MESSAGE}", ""),
    HarmonyParser,
)
_QWEN_CODER = _Calls(
    CallSyntax(
        xml_calls.OPEN, "\n<function=", ">\n", "</function>\n</tool_call>", between="\n<tool_call>",
        write_arguments=write_parameters,
    ),
    XmlCallParser,
)  # fmt: skip
_NAMES: tuple[tuple[_Calls, ToolCallParser], ...] = (
    (_HERMES, "hermes"), (_LLAMA, "llama3_json"), (_MISTRAL, "mistral"), (_MISTRAL_NAMED, "mistral"),
    (_QWEN_CODER, "qwen3_coder"),
    (_HARMONY, "openai"),
)  # fmt: skip
_MARKS = (
    harmony.START, harmony.CHANNEL, harmony.CONSTRAIN, harmony.MESSAGE, harmony.END, harmony.CALL, harmony.RETURN,
    thinking.BEGIN, thinking.END, "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]",
    "[CALL_ID]",
)  # fmt: skip


class ChatFormat:
    """The format of one base."""

    def __init__(
        self, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, parser: ToolCallParser | None, ends: Collection[int]
    ) -> None:
        """
        Args:
            parser: None: found by the template.
            ends: tokens that end a completion.
        """
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else str(tokenizer.chat_template)
        self._prompts = prompts
        self._calls = _choose_calls(template, parser)
        self._thinks = thinking.BEGIN in template and thinking.END in template
        added = {str(token): (id, token.special) for id, token in tokenizer.added_tokens_decoder.items()}
        known = {mark: added[mark] for mark in _MARKS if mark in added}
        self.marks = {id for id, is_special in known.values() if is_special and id not in ends}
        """Special tokens that parsers read in a completion's text."""
        # llguidance takes every added token in angle brackets for a special one
        self._spell = make_speller({mark: id for mark, (id, special) in known.items() if special or mark[0] == "<"})

    @property
    def tool_call_parser(self) -> ToolCallParser | None:
        """How the base writes calls; None: not in a way that is known."""
        return next((name for calls, name in _NAMES if calls is self._calls), None)

    def open(self, prompt: ChatPrompt, grammar: Grammar | None) -> OpenChat:
        """Make a prompt of a conversation, and find out how its answer is read.

        Args:
            grammar: that the answer is to follow.

        Raises:
            RequestError: the template refuses the conversation or shows no tools, or no answer can follow the grammar.
        """
        names = [tool["function"]["name"] for tool in prompt.tools]
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in prompt.tools}
        if names and self._calls is None:
            raise RequestError(
                "tools: the base's chat template writes no calls in a known way; set engine.tool_call_parser where it "
                "does, or describe the tools in a message"
            )
        text = self._prompts.render_chat(prompt.messages, prompt.tools)
        for name in names:
            if name not in text:
                raise RequestError(f"tools: the base's chat template does not show {name!r}; describe it in a message")
        has_begun = self._thinks and text.rstrip().endswith(thinking.BEGIN)
        grammar = self._find_grammar(prompt, grammar, has_begun=has_begun)
        tokens = self._prompts.encode(text)
        if not (names or self._thinks or self._calls is _HARMONY):
            return OpenChat(tokens, grammar)
        return OpenChat(tokens, grammar, lambda: self._make_parser(schemas, has_begun=has_begun))

    def _make_parser(self, tools: Mapping[str, Mapping[str, Any]], *, has_begun: bool) -> Parser:
        if self._calls is _HARMONY:
            return HarmonyParser(tools)
        parser = self._calls.make_parser(tools) if tools and self._calls is not None else PlainParser()
        return ThinkingParser(parser, begun=has_begun) if self._thinks else parser

    def _find_grammar(self, prompt: ChatPrompt, grammar: Grammar | None, *, has_begun: bool) -> Grammar | None:
        """Return the grammar of the whole completion: thinking, and then calls or a reply."""
        strict = any(tool["function"].get("strict") for tool in prompt.tools)
        if grammar is not None and grammar.kind == "grammar":
            return grammar  # the client's own is of all that comes
        if prompt.must_call or strict or (prompt.tools and grammar is not None):
            rules = self._write_answer(prompt, grammar)
        elif grammar is None or not (self._thinks or self._calls is _HARMONY):
            return grammar
        else:
            rules = [f"answer: {self._write_final()} reply", write_reply(grammar)]
        return Grammar(kind="lark", text="\n".join([*self._write_start(has_begun=has_begun), *rules, ""]))

    def _write_answer(self, prompt: ChatPrompt, grammar: Grammar | None) -> list[str]:
        """Return the rules of an answer with calls, or perhaps of a reply instead.

        Args:
            grammar: of the reply; None: any text.
        """
        assert self._calls is not None
        named = [tool for tool in prompt.tools if not prompt.must_call or tool["function"]["name"] in prompt.must_call]
        calls = write_calls(named, self._calls.syntax, self._spell, several=prompt.parallel)
        if prompt.must_call:
            return ["answer: calls", calls]
        final = self._write_final()
        if grammar is not None:
            return [f"answer: {final} reply | calls", write_reply(grammar), calls]
        if self._calls is _HARMONY:
            return [f"answer: {final} TEXT? | calls", TEXT, calls]
        if self._calls is _LLAMA:
            return ["answer: REPLY? | calls", r"REPLY: /[^{\s](?s:.*)/", calls]
        return [write_text_or_calls(self._calls.syntax.mark, self._spell), calls]

    def _write_final(self) -> str:
        """Return the terms before a reply."""
        return self._spell(f"{harmony.CHANNEL}final{harmony.MESSAGE}") if self._calls is _HARMONY else ""

    def _write_start(self, *, has_begun: bool) -> list[str]:
        """Return the rule `start`, by which thinking may come before the rule `answer`."""
        spell = self._spell
        if self._calls is _HARMONY:
            begin, end = f"{harmony.CHANNEL}analysis{harmony.MESSAGE}", f"{harmony.END}{harmony.START}assistant"
            return ["start: thought? answer", f"thought: {spell(begin)} THOUGHT {spell(end)}", _THOUGHT]
        if not self._thinks:
            return ["start: answer"]
        start = "start: thought answer" if has_begun else "start: (begin thought)? answer"
        end = spell(thinking.END)
        thought = f"thought: THOUGHT {end} SPACE" if end.startswith("<[") else f"thought: thought_end SPACE\n{_LAZY}"
        return [start, f"begin: {spell(thinking.BEGIN)}", thought, _THOUGHT, r"SPACE: /\n{0,2}/"]


_THOUGHT = "THOUGHT: /(?s:.*)/"
_LAZY = r"thought_end[lazy]: /(?s:.*)<\/think>/"


def _choose_calls(template: str, parser: ToolCallParser | None) -> _Calls | None:
    """Return how a template writes calls, by its own words; None: not in a way that is known."""
    if parser == "openai" or (parser is None and harmony.CHANNEL in template):
        return _HARMONY
    if parser == "mistral" or (parser is None and "[TOOL_CALLS]" in template):
        return _MISTRAL_NAMED if "[ARGS]" in template else _MISTRAL
    if parser == "qwen3_coder" or (parser is None and "<tool_call>" in template and "<function=" in template):
        return _QWEN_CODER
    if parser == "hermes" or (parser is None and "<tool_call>" in template):
        return _HERMES
    if parser == "llama3_json" or (parser is None and "<|start_header_id|>" in template and '"parameters"' in template):
        return _LLAMA
    return None
