"""Prompts: from texts and conversations to tokens, as training has them, and where a turn ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankloom.data.encode import Encoder
from rankloom.data.render import system_in_user, takes_system
from rankloom.errors import RequestError


class Prompts:
    """A base's way with text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        self._tokenizer, self._encoder = tokenizer, Encoder(tokenizer)
        self._has_template = tokenizer.chat_template is not None
        self._takes_system = self._has_template and takes_system(tokenizer)
        own = getattr(model.generation_config, "eos_token_id", None)
        self.turn_end = self._template_end() or int(tokenizer.eos_token_id)
        """The token after an assistant's turn."""
        ends = {self.turn_end, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        self.end_ids = frozenset(token for token in ends if token is not None)
        """Every token that ends a completion."""

    def tokens(self, text: str) -> list[int]:
        """Of a text that begins a prompt."""
        (ids,) = self._encoder.encode([text])
        bos = self._encoder.bos
        return ids if ids[: len(bos)] == bos else [*bos, *ids]

    def completion(self, text: str) -> list[int]:
        """Of a text that follows a prompt, with the end of the turn."""
        (ids,) = self._encoder.encode_rest([text])
        return [*ids, self.turn_end]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Of a conversation that asks for the assistant's turn; raises RequestError where that can't be."""
        if not self._has_template:
            raise RequestError("messages: the base's tokenizer has no chat template; ask for a completion of a prompt")
        if not messages:
            raise RequestError("messages: empty; give at least one")
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        if not self._takes_system and len(plain) > 1:
            plain = system_in_user(plain)
        try:
            text = self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            roles = ", ".join(m["role"] for m in plain)
            raise RequestError(f"messages: the base's chat template refuses the roles {roles}: {error}") from None
        return self._encoder.encode([str(text)])[0]

    def _template_end(self) -> int | None:
        """The last special token that the chat template puts after an assistant's turn, if it does."""
        if not self._has_template:
            return None
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text = str(self._tokenizer.apply_chat_template(turn, tokenize=False))
        except jinja2.TemplateError:
            return None
        (ids,) = self._encoder.encode([text.rstrip()])
        special = self._tokenizer.added_tokens_decoder
        return ids[-1] if ids and ids[-1] in special and special[ids[-1]].special else None
