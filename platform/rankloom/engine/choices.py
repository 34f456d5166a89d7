"""A completion that is one of several texts: a walk down the tree of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from rankloom.engine.prompts import Prompts
from rankloom.errors import DataError, RequestError
from rankloom.evals.labels import LabelTrie, Node


def build_choice_tree(choices: Sequence[str], prompts: Prompts) -> LabelTrie:
    """Return the tree of some texts' tokens. Raises RequestError where two become the same tokens."""
    try:
        # with the end of the turn, so that no choice's tokens begin another's
        return LabelTrie({text: prompts.tokenize_completion(text) for text in choices})
    except DataError as error:
        raise RequestError(f"choices: {error}") from None


class ChoiceState:
    """The position of one completion in the tree."""

    def __init__(self, tree: LabelTrie) -> None:
        self._node: Node = tree.root
        self._at = 0
        """Tokens of the node that were generated."""

    @property
    def allowed(self) -> list[int]:
        """The tokens that may come next."""
        return self._node.tokens[self._at : self._at + 1] or list(self._node.children)

    @property
    def is_over(self) -> bool:
        return self._at == len(self._node.tokens) and not self._node.children

    @property
    def error(self) -> None:
        return None

    def advance(self, token: int) -> None:
        if self._at == len(self._node.tokens):
            self._node, self._at = self._node.children[token], 0
        self._at += 1

    def take_forced(self) -> list[int]:
        """Return the tokens that follow without an alternative, except the end of the turn, and advance past them."""
        tokens, self._at = self._node.tokens[self._at :], len(self._node.tokens)
        return tokens[:-1] if self.is_over else tokens
