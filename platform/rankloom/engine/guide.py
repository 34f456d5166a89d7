"""What constrains a completion: the tree of its choices, and its stop strings.

Preparing it takes longer for longer texts, so a thread does it, once for all completions of a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from functools import partial
from weakref import WeakValueDictionary

from rankloom.engine.choices import build_choice_tree
from rankloom.engine.jobs import AT_ONCE
from rankloom.engine.prompts import Prompts
from rankloom.engine.protocol import Request, Sampling
from rankloom.engine.text import Stops


class Guide:
    """Make what constrains a request. Raises RequestError where two choices become the same tokens."""

    def __init__(self, sampling: Sampling, prompts: Prompts) -> None:
        self.tree = None if sampling.choices is None else build_choice_tree(sampling.choices, prompts)
        self.stops = Stops(sampling.stop)


class Guides:
    """The guides of the requests in flight."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._made: WeakValueDictionary[Hashable, Guide] = WeakValueDictionary()
        self._making: dict[Hashable, asyncio.Task[Guide]] = {}

    async def make_guide(self, request: Request) -> Guide:
        """Make what constrains a request. Raises RequestError where two choices become the same tokens."""
        sampling = request.sampling
        key = (request.tenant, sampling.choices, sampling.stop)
        if (guide := self._made.get(key)) is not None:
            return guide
        if sum(map(len, (*(sampling.choices or ()), *sampling.stop))) <= AT_ONCE:
            guide = Guide(sampling, self._prompts)
        else:
            if key not in self._making:
                self._making[key] = asyncio.create_task(asyncio.to_thread(Guide, sampling, self._prompts))
                self._making[key].add_done_callback(partial(self._forget, key))
            guide = await asyncio.shield(self._making[key])  # others may wait for it
        self._made[key] = guide
        return guide

    def _forget(self, key: Hashable, made: asyncio.Task[Guide]) -> None:
        del self._making[key]
        if not made.cancelled():
            made.exception()  # else it is logged, with the choices, where everybody who waited for it has gone
