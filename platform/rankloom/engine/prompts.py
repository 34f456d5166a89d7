"""Prompts: from texts and conversations to tokens, as training has them, and where a turn ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankloom.data.encode import Encoder
from rankloom.data.template import ChatTemplate, TemplateError
from rankloom.errors import RequestError


class Prompts:
    """Tokenises a base's prompts and conversations.

    Args:
        split_special_tokens: whether special tokens in messages' texts are kept as text, as by the data's setting.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, split_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template is not None else None
        self._encoder = Encoder(tokenizer, split_special_tokens and self._template is not None)
        own = getattr(model.generation_config, "eos_token_id", None)
        self.turn_end = self._find_template_end() or int(tokenizer.eos_token_id)
        """The token after an assistant's turn."""
        ends = {self.turn_end, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        self.end_ids = frozenset(token for token in ends if token is not None)
        """Every token that ends a completion."""
        self.shown_in_echo = frozenset(self._encoder.special) - frozenset(self._encoder.bos)
        """The special tokens that a prompt's text shows: all but the one that is before every text."""
        with suppress(RequestError):  # builds the tables for special tokens in texts now, not during a request
            self.encode(self._encoder.mark(str(tokenizer.eos_token)))

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text that begins a prompt; special tokens in it count as such."""
        ids = self.encode(text)
        bos = self._encoder.bos
        return ids if ids[: len(bos)] == bos else [*bos, *ids]

    def tokenize_completion(self, text: str) -> list[int]:
        """Return the token ids of a text that follows a prompt, with the end of the turn."""
        return [*self.encode(self._encoder.mark(text), rest=True), self.turn_end]

    def tokenize_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the token ids of a conversation, up to the assistant's turn. Raises RequestError where it can't be."""
        return self.encode(self.render_chat(messages))

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Return a conversation's text, up to the assistant's turn. Raises RequestError where it can't be."""
        if self._template is None:
            raise RequestError("messages: the base's tokenizer has no chat template; ask for a completion of a prompt")
        if not messages:
            raise RequestError("messages: empty; give at least one")
        try:
            marked = [self._encoder.mark(dict(message)) for message in messages]
            return self._template.render_prompt(marked, self._encoder.mark([dict(tool) for tool in tools]) or None)
        except TemplateError as error:  # which may quote a text: whoever knew a mark could write special tokens
            raise RequestError(f"messages: {self._encoder.unmark(str(error))}") from None

    def encode(self, text: str, rest: bool = False) -> list[int]:
        """Return the token ids of a text. Raises RequestError where a special token can't be told from text."""
        try:
            (ids,) = (self._encoder.encode_rest if rest else self._encoder.encode)([text])
        except ValueError as error:
            raise RequestError(f"The text can't be tokenised: {error}") from None
        return ids

    def _find_template_end(self) -> int | None:
        """Return the last special token that the chat template puts after an assistant's turn, if it does."""
        if self._template is None:
            return None
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text = self._template.render(turn, self._template.find_form(turn[:1]))
        except TemplateError:
            return None
        (ids,) = self._encoder.encode([text.rstrip()])
        special = self._tokenizer.added_tokens_decoder
        return ids[-1] if ids and ids[-1] in special and special[ids[-1]].special else None
