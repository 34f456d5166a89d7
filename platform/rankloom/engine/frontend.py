"""EngineFrontend: what each engine does around its computing, which is a subclass's: texts to tokens, and admission."""

from __future__ import annotations

from collections.abc import Sequence

from rankloom.config.engine import EngineConfig, VllmConfig
from rankloom.engine.admission import Admission
from rankloom.engine.chat.format import ChatFormat
from rankloom.engine.echo import PromptEcho
from rankloom.engine.grammar import Grammars
from rankloom.engine.guide import Guides
from rankloom.engine.prompts import Prompts
from rankloom.engine.protocol import ChatPrompt, Echo, Grammar, OpenChat, Pooling, Request
from rankloom.engine.text import Decoder
from rankloom.errors import RequestError
from rankloom.models import Base


class EngineFrontend:
    """The part of the `Engine` of `protocol.py` that needs only the base's tokenizer and shape."""

    def __init__(
        self, base: Base, config: EngineConfig | VllmConfig, num_seqs: int, *, follows_grammars: bool = True
    ) -> None:
        """
        Args:
            num_seqs: sequences that run at once; `config.max_queue` more may wait.
            follows_grammars: False: another program does.
        """
        self._base = base
        self._prompts = Prompts(base.tokenizer, base.model, config.split_special_tokens)
        self._vocabulary = count_vocabulary(base)
        grammars = Grammars(base.tokenizer, self._prompts.end_ids, self._vocabulary) if follows_grammars else None
        self._guides, self._decoder = Guides(self._prompts, grammars), Decoder(base.tokenizer)
        self._chat = ChatFormat(self._prompts, base.tokenizer, config.tool_call_parser, self._prompts.end_ids)
        self._chat_decoder = Decoder(base.tokenizer, self._chat.marks)
        self._echo_decoder = Decoder(base.tokenizer, self._prompts.shown_in_echo)
        self._admission = Admission(num_seqs + config.max_queue, self._vocabulary)

    @property
    def base_id(self) -> str:
        return self._base.id

    def tokenize(self, text: str, *, begins: bool = True) -> list[int]:
        return self._prompts.tokenize(text) if begins else self._prompts.encode(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        if tokens and max(tokens) >= self._vocabulary:
            raise RequestError(f"tokens: {max(tokens)} is outside of the vocabulary of {self._vocabulary}")
        return str(self._base.tokenizer.decode(list(tokens)))

    def name_tokens(self, tokens: Sequence[int]) -> list[str]:
        return [self._decoder.get_name(token) for token in tokens]

    def open_chat(self, prompt: ChatPrompt, grammar: Grammar | None) -> OpenChat:
        return self._chat.open(prompt, grammar)

    def open_echo(self, prompt: Sequence[int]) -> Echo:
        return PromptEcho(self._echo_decoder, prompt)

    def _check_pooling(self, pooling: Pooling | None) -> None:
        """Raise RequestError where more numbers are asked for than there are."""
        width = int(self._base.model.config.get_text_config().hidden_size)
        if pooling is not None and (pooling.dimensions or 0) > width:
            raise RequestError(f"dimensions: {pooling.dimensions} is above {width}, this base's number of dimensions")

    def _get_decoder(self, request: Request) -> Decoder:
        return self._chat_decoder if request.shows_marks else self._decoder


def count_vocabulary(base: Base) -> int:
    """Return the number of tokens that the base has embeddings for."""
    return int(base.model.get_input_embeddings().weight.shape[0])
