"""Completions that match a JSON schema, a regular expression or a grammar, through llguidance.

Compiling takes up to half a second, without the interpreter's lock, and ends at limits that bound its time and memory;
so does each mask. A grammar that reaches a limit fails its own request.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Collection
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rankloom.engine.protocol import Grammar
from rankloom.errors import RequestError

logger = logging.getLogger(__name__)

SPACE = r"( |\n {0,32})?"
"""Between two parts of a JSON text: nothing, a space, or a line break with its indentation. Unbounded space would let a
model continue in it for ever."""
JSON_OPTIONS: Any = {"whitespace_pattern": SPACE, "lenient": False, "coerce_one_of": False}
"""They take precedence over a schema's own options: no keyword of it is ignored."""
SLOW_S = 0.001
"""CPU time of a mask above which other rows do not wait for it; the masks of most schemas take a tenth of it."""
NAMES = {
    "json": "the JSON schema",
    "regex": "the regular expression",
    "grammar": "the grammar",
    "lark": "a schema of the answer or of a tool",
}


class Grammars:
    """Compiles grammars to a tokenizer's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int], vocabulary: int) -> None:
        """
        Args:
            end_ids: the tokens that may end a completion once it matches.
            vocabulary: the number of logits.
        """
        self._tokenizer, self._end_ids, self._vocabulary = tokenizer, sorted(end_ids), vocabulary
        self._tokens: LLTokenizer | None = None
        self._reason = "it was not opened"
        """Why there are no tokens."""
        # a mask takes about 10 ms and 40 MB at the most
        self._limits = LLParserLimits(
            initial_lexer_fuel=1_000_000, step_lexer_fuel=100_000, step_max_items=5_000, max_lexer_states=20_000,
            max_grammar_size=200_000, verbose_errors=False,
        )  # fmt: skip

    def open(self) -> None:
        """Read the tokenizer's tokens, which takes up to seconds and stalls other threads: before requests come."""
        vocabulary = max(self._vocabulary, len(self._tokenizer))  # a model may have no logits for the last tokens
        try:
            self._tokens = from_tokenizer(self._tokenizer, n_vocab=vocabulary, eos_token=self._end_ids)
        except Exception as error:  # of a kind that llguidance can't read; all else is served
            self._reason = _shorten(str(error))
            logger.info("no completion can follow a grammar: the tokenizer can't be read: %s", self._reason)

    def compile(self, grammar: Grammar) -> GrammarState:
        """Return the state at the start of a completion. Raises RequestError where the grammar can't be honoured."""
        name = NAMES[grammar.kind]
        if self._tokens is None:
            raise RequestError(f"{name} can't be honoured: the base's tokenizer can't be read: {self._reason}")
        try:
            matcher = LLMatcher(self._tokens, _convert(grammar), limits=self._limits, log_level=0)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{name} can't be honoured: {_shorten(str(error))}") from None
        if matcher.is_error():
            why = matcher.get_error()
            if grammar.kind == "lark":  # whose text the client has not written
                why = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", why.partition("\n")[0])
            raise RequestError(f"{name} can't be honoured: {_shorten(why)}")
        state = GrammarState(matcher, self._tokens)
        state.prepare()
        return state


class GrammarState:
    """The position of one completion in its grammar."""

    def __init__(self, matcher: LLMatcher, tokens: LLTokenizer) -> None:
        self._matcher, self._tokens = matcher, tokens
        self._new: list[int] = []
        """Tokens that the matcher has yet to consume."""
        self.prepared: NDArray[np.int32] | None = None
        """The mask at this position, where it is known."""
        self.is_slow = False
        """Whether others would wait for its mask, so that it is prepared before a step."""

    def copy(self) -> GrammarState:
        """Return the state of another completion at the same position."""
        copied = GrammarState(self._matcher.deep_copy(), self._tokens)
        copied.prepared, copied.is_slow = self.prepared, self.is_slow
        return copied

    @property
    def is_over(self) -> bool:
        return False  # a token that ends the completion does

    @property
    def error(self) -> str | None:
        """Why the last mask allows nothing but the end, where that is not the grammar's own doing."""
        return _shorten(self._matcher.get_error()) if self._matcher.is_error() else None

    def advance(self, token: int) -> None:
        self._new.append(token)
        self.prepared = None

    def take_forced(self) -> list[int]:
        return []

    def find_mask(self) -> NDArray[np.int32]:
        """Return the mask after all tokens so far, in words of 32 bits; there may be one more than the vocabulary has.

        Thread-safe beside other states.
        """
        if self.prepared is not None:
            return self.prepared
        began = time.thread_time()
        new, self._new = self._new, []
        self._matcher.consume_tokens(new)
        mask = self._spell_out(np.frombuffer(self._matcher.compute_bitmask(), np.int32))
        self.is_slow = time.thread_time() - began > SLOW_S
        return mask

    def _spell_out(self, mask: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return a mask with the first piece of a text in place of an added token for it.

        Where a text is forced, llguidance offers such a token, and refuses it then, for it stands for no text.
        """
        words = np.flatnonzero(mask)
        bits = int(mask[words[0]]) % (1 << 32) if len(words) == 1 else 0
        token = 32 * int(words[0]) + bits.bit_length() - 1 if bits.bit_count() == 1 else None
        if token is None or not self._tokens.is_special_token(token) or self._matcher.validate_tokens([token]):
            return mask
        pieces = self._tokens.greedy_tokenize(self._matcher.compute_ff_bytes().decode(errors="ignore"))
        if not pieces:
            return mask  # it ends the completion
        spelled = np.zeros_like(mask)
        spelled.view(np.uint32)[pieces[0] // 32] = 1 << pieces[0] % 32
        return spelled

    def prepare(self) -> None:
        """Find the mask before it is needed."""
        self.prepared = self.find_mask()


def _convert(grammar: Grammar) -> str:
    """Return a grammar as llguidance takes it. Raises ValueError."""
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    if grammar.kind != "json":
        return grammar_from(grammar.kind, grammar.text)
    schema = json.loads(grammar.text)
    if schema is False:
        raise ValueError("false allows no value")
    return LLMatcher.grammar_from_json_schema({} if schema is True else schema, overrides=JSON_OPTIONS)


def _shorten(text: str) -> str:
    """Return an error as one line."""
    return " ".join(text.split())[:300]
