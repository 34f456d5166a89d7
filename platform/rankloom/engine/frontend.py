"""EngineFrontend: what each engine does around its computing, which is a subclass's: texts to tokens, and admission."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rankloom.config.engine import EngineConfig, VllmConfig
from rankloom.engine.admission import Admission
from rankloom.engine.grammar import Grammars
from rankloom.engine.guide import Guides
from rankloom.engine.prompts import Prompts
from rankloom.engine.text import Decoder
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
        vocabulary = count_vocabulary(base)
        grammars = Grammars(base.tokenizer, self._prompts.end_ids, vocabulary) if follows_grammars else None
        self._guides, self._decoder = Guides(self._prompts, grammars), Decoder(base.tokenizer)
        self._admission = Admission(num_seqs + config.max_queue, vocabulary)

    @property
    def base_id(self) -> str:
        return self._base.id

    def tokenize(self, text: str) -> list[int]:
        return self._prompts.tokenize(text)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self._prompts.tokenize_chat(messages)


def count_vocabulary(base: Base) -> int:
    """Return the number of tokens that the base has embeddings for."""
    return int(base.model.get_input_embeddings().weight.shape[0])
