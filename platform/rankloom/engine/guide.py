"""What constrains a completion: its stop strings, and the tree of its choices or its grammar.

Preparing it takes longer for longer texts, so threads do it, once for all completions of a request, and only a few at a
time: no request waits for the prompts of another behind a grammar.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from weakref import WeakValueDictionary

from rankloom.engine.choices import ChoiceState, build_choice_tree
from rankloom.engine.grammar import Grammars
from rankloom.engine.jobs import AT_ONCE
from rankloom.engine.masks import Constraint
from rankloom.engine.prompts import Prompts
from rankloom.engine.protocol import Request, Sampling
from rankloom.engine.text import Stops

MOST_AT_ONCE = 2
"""Guides that are prepared at a time."""


class Guide:
    """Make what constrains a request.

    Raises:
        RequestError: two choices become the same tokens, or the grammar can't be honoured.
    """

    def __init__(self, sampling: Sampling, prompts: Prompts, grammars: Grammars | None) -> None:
        """`grammars`: None: another program follows the grammars."""
        self._tree = None if sampling.choices is None else build_choice_tree(sampling.choices, prompts)
        self._start = None if sampling.grammar is None or grammars is None else grammars.compile(sampling.grammar)
        self.stops = Stops(sampling.stop)

    def make_constraint(self) -> Constraint | None:
        """Return the constraint of one completion, at its start; None: there is none."""
        if self._tree is not None:
            return ChoiceState(self._tree)
        return None if self._start is None else self._start.copy()


class Guides:
    """The guides of the requests in flight."""

    def __init__(self, prompts: Prompts, grammars: Grammars | None) -> None:
        self._prompts, self._grammars = prompts, grammars
        self._made: WeakValueDictionary[Hashable, Guide] = WeakValueDictionary()
        self._making: dict[Hashable, asyncio.Future[Guide]] = {}
        self._threads = ThreadPoolExecutor(MOST_AT_ONCE, "rankloom-guides")

    def open(self) -> None:
        """Do what takes long and is the same for all. Call it in a thread, before requests come."""
        if self._grammars is not None:
            self._grammars.open()

    async def make_guide(self, request: Request) -> Guide:
        """Make what constrains a request. Raises as `Guide` does."""
        sampling = request.sampling
        key = (request.tenant, sampling.choices, sampling.grammar, sampling.stop)
        if (guide := self._made.get(key)) is not None:
            return guide
        length = sum(map(len, (*(sampling.choices or ()), *sampling.stop)))
        if length <= AT_ONCE and sampling.grammar is None:
            guide = Guide(sampling, self._prompts, self._grammars)
        else:
            if key not in self._making:
                call = partial(Guide, sampling, self._prompts, self._grammars)
                self._making[key] = asyncio.get_running_loop().run_in_executor(self._threads, call)
                self._making[key].add_done_callback(partial(self._forget, key))
            guide = await asyncio.shield(self._making[key])  # others may wait for it
        self._made[key] = guide
        return guide

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _forget(self, key: Hashable, made: asyncio.Future[Guide]) -> None:
        del self._making[key]
        if not made.cancelled():
            made.exception()  # else it is logged, with the choices, where everybody who waited for it has gone
