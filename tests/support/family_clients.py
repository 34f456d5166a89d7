"""Clients of endpoints on tiny bases with each family's chat template."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from openai import OpenAI
from transformers import AutoTokenizer

from chat_templates import FAMILIES, write_base
from endpoint import listening
from one_engine import OneEngine
from rankloom.config import parse
from rankloom.config.serve import ServeConfig
from rankloom.gateway.gateway import Gateway
from rankloom.registry import Registry
from served import load

T = TypeVar("T")


def ask_at_once(ask: Callable[[int], T], num_seeds: int) -> list[T]:
    """Return the answers for each seed, asked for side by side: a batch takes little longer than a row."""
    with ThreadPoolExecutor(num_seeds) as pool:
        return list(pool.map(ask, range(num_seeds)))


class Clients:
    """A client of an endpoint on each family, which starts when it is first asked for."""

    def __init__(self, folder: Path, tiny: Path, stack: ExitStack) -> None:
        self._folder, self._tiny, self._stack = folder, tiny, stack
        self._made: dict[str, OpenAI] = {}

    def __getitem__(self, family: str) -> OpenAI:
        if family not in self._made:
            base = load(write_base(self._tiny, self._folder / family, family))
            replicas = OneEngine(base, Registry(self._folder / "registry"))
            config = parse(ServeConfig, {"base": base.id, "limits": {"max_tokens": 1500, "timeout_s": 600}})
            gateway = Gateway(config, Registry(self._folder / "registry"), replicas)
            self._stack.callback(lambda: asyncio.run(replicas.engine.close()))
            url = self._stack.enter_context(listening(gateway))
            self._made[family] = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        return self._made[family]

    def write_script(self, family: str, script: str) -> str:
        """Return the grammar of one text."""
        tokenizer = AutoTokenizer.from_pretrained(self._folder / family)
        words = [*FAMILIES[family].special, *FAMILIES[family].plain]
        parts = re.split("|".join(f"({re.escape(word)})" for word in words), script)
        terms = [
            f"<[{tokenizer.convert_tokens_to_ids(part)}]>" if part in words else json.dumps(part)
            for part in parts
            if part
        ]
        return "start: " + " ".join(terms) + "\n"
