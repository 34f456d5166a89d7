"""PrefixTree: keys and values of earlier sequences, for later ones with the same beginning.

It has a radix tree of tokens for each adapter version and tenant. Keys and values depend on the adapter, so another one
must never find them; and a hit reveals an earlier prompt, so another tenant must not either. What two prompts share,
such as a system prompt, is kept once. The least recently used leaves are dropped when room is needed.

Shapes: t tokens of a node, F numbers of a token in all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

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


class PrefixTree:
    """Invariant: no more than `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_tokens = 0
        self._roots: dict[Hashable, _Node] = {}
        self._clock = 0

    def match(self, key: Hashable, tokens: Sequence[int]) -> tuple[int, list[Tensor]]:
        """Find the longest known beginning: its length, and its keys and values [t, F] in pieces."""
        length, pieces = 0, []
        for node, common in self._follow(key, tokens):
            assert node.values_tF is not None
            pieces.append(node.values_tF[:common])
            length += common
        return (length, pieces) if length >= WORTHWHILE else (0, [])

    def insert(self, key: Hashable, tokens: Sequence[int], read: Callable[[int, int], Tensor]) -> None:
        """Keep a sequence's beginning.

        Args:
            read: returns a copy of the keys and values of a span of the sequence's tokens.
        """
        if len(tokens) > self.capacity:
            return
        path = list(self._follow(key, tokens))
        length = sum(common for _, common in path)
        if len(tokens) - length < WORTHWHILE:
            return
        if path:
            above, common = path[-1]
            if common < len(above.tokens):
                above = self._split(above, common)
        else:
            above = self._roots.setdefault(key, _Node((), None, None))
        node = _Node(tuple(tokens[length:]), read(length, len(tokens)), above, used=self._clock)
        above.children[node.tokens[0]] = node
        self.num_tokens += len(node.tokens)
        while self.num_tokens > self.capacity:
            self._drop(min(self._list_leaves(), key=lambda leaf: leaf.used))

    def clear(self) -> None:
        """Drop everything."""
        self._roots, self.num_tokens = {}, 0

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
        assert leaf.parent is not None
        del leaf.parent.children[leaf.tokens[0]]
        self.num_tokens -= len(leaf.tokens)
        self._roots = {key: root for key, root in self._roots.items() if root.children}
