"""PrefixTree: keys and values of earlier sequences, for later ones with the same beginning.

It has a radix tree of tokens for each adapter version and tenant. Keys and values depend on the adapter, so another one
must never find them; and a hit reveals an earlier prompt, so another tenant must not either. What two prompts share,
such as a system prompt, is kept once. The least recently used leaves are dropped when room is needed.

Layers with states have these after some tokens only, so a beginning is known up to the last of them.

Shapes: t tokens of a node, F numbers of a token in all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rankloom.engine.kv_cache import States

WORTHWHILE = 16
"""Fewest tokens for which copying is faster than computing."""


@dataclass(eq=False)
class _Node:
    tokens: tuple[int, ...]
    values_tF: Tensor | None
    """None: a root's."""
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)
    """By first token."""
    used: int = 0
    states: States = ()
    """After its last token; empty: unknown."""


@dataclass(frozen=True)
class PrefixMatch:
    """The beginning of a sequence that is known."""

    length: int
    pieces: tuple[Tensor, ...]
    """Keys and values of its tokens [t, F]."""
    states: States
    """After its last token."""
    num_agreeing: int
    """Tokens that an earlier sequence had too; beyond `length`, they are to be computed for their states."""


class PrefixTree:
    """Invariant: no more than `capacity` tokens, where states count as `tokens_per_states`."""

    def __init__(self, capacity: int, tokens_per_states: int = 0) -> None:
        """
        Args:
            tokens_per_states: tokens whose keys and values take the memory of a sequence's states; 0: there are none.
        """
        self.capacity, self.tokens_per_states = capacity, tokens_per_states
        self.num_tokens = 0
        self._roots: dict[Hashable, _Node] = {}
        self._clock = 0

    def match(self, key: Hashable, tokens: Sequence[int]) -> PrefixMatch:
        """Find the longest known beginning."""
        path = list(self._follow(key, tokens))
        known = self._cut(path)
        length = _count(known)
        if length < WORTHWHILE:
            return PrefixMatch(0, (), (), _count(path))
        pieces = tuple(node.values_tF[:common] for node, common in known if node.values_tF is not None)
        return PrefixMatch(length, pieces, known[-1][0].states, _count(path))

    def insert(
        self, key: Hashable, tokens: Sequence[int], read: Callable[[int, int], Tensor], states: States = ()
    ) -> None:
        """Keep a sequence's beginning.

        Args:
            read: returns a copy of the keys and values of a span of the sequence's tokens.
            states: after these tokens.
        """
        if len(tokens) + self.tokens_per_states > self.capacity:
            return
        path = list(self._follow(key, tokens))
        if len(tokens) - _count(self._cut(path)) < WORTHWHILE:
            return
        length = _count(path)
        if path:
            node, common = path[-1]
            if common < len(node.tokens):
                node = self._split(node, common)
        else:
            node = self._roots.setdefault(key, _Node((), None, None))
        if length < len(tokens):
            child = _Node(tuple(tokens[length:]), read(length, len(tokens)), node, used=self._clock)
            node.children[child.tokens[0]] = node = child
            self.num_tokens += len(node.tokens)
        node.states = states
        self.num_tokens += self.tokens_per_states
        while self.num_tokens > self.capacity:
            self._drop(min(self._list_leaves(), key=lambda leaf: leaf.used))

    def clear(self) -> None:
        """Drop everything."""
        self._roots, self.num_tokens = {}, 0

    def _cut(self, path: list[tuple[_Node, int]]) -> list[tuple[_Node, int]]:
        """Return the part of a way that can be continued."""
        if not self.tokens_per_states:
            return path
        ends = [i for i, (node, common) in enumerate(path, 1) if node.states and common == len(node.tokens)]
        return path[: max(ends, default=0)]

    def _follow(self, key: Hashable, tokens: Sequence[int]) -> Iterator[tuple[_Node, int]]:
        """Yield the nodes on the way, and how many tokens of each agree."""
        self._clock += 1
        node, at = self._roots.get(key), 0
        while node is not None and at < len(tokens):
            node = node.children.get(tokens[at])
            if node is None:
                return
            node.used = self._clock
            common = next(
                (i for i, (a, b) in enumerate(zip(node.tokens, tokens[at:], strict=False)) if a != b),
                min(len(node.tokens), len(tokens) - at),
            )
            yield node, common
            if common < len(node.tokens):
                return
            at += common

    def _split(self, node: _Node, at: int) -> _Node:
        """Cut a node in two; returns the upper one."""
        assert node.parent is not None
        assert node.values_tF is not None
        upper = _Node(node.tokens[:at], node.values_tF[:at].clone(), node.parent, used=node.used)
        node.parent.children[upper.tokens[0]] = upper
        node.tokens, node.values_tF, node.parent = node.tokens[at:], node.values_tF[at:].clone(), upper
        upper.children[node.tokens[0]] = node
        return upper

    def _list_leaves(self) -> Iterator[_Node]:
        nodes = [child for root in self._roots.values() for child in root.children.values()]
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            if not node.children:
                yield node

    def _drop(self, leaf: _Node) -> None:
        above = leaf.parent
        assert above is not None
        del above.children[leaf.tokens[0]]
        self.num_tokens -= len(leaf.tokens) + (self.tokens_per_states if leaf.states else 0)
        if self.tokens_per_states and above.parent is not None and not above.children and not above.states:
            self._drop(above)  # which can't be continued
        self._roots = {key: root for key, root in self._roots.items() if root.children}


def _count(path: Sequence[tuple[_Node, int]]) -> int:
    return sum(common for _, common in path)
