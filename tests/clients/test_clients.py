"""Clients of OpenAI's API do their own documented examples on a real engine over HTTP; scripts beside this file.

RANKLOOM_TEST_CLIENTS names Python interpreters that have the libraries, and RANKLOOM_TEST_NODE the folder with
`node_modules`. A client that is in none of them is skipped.

The model is tiny and random. What it must call, or write by a schema, it does; what is up to it is noise.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from chat_templates import write_base
from endpoint import listening
from one_engine import OneEngine
from other_pythons import find_python
from rankloom.config import parse
from rankloom.config.serve import ServeConfig
from rankloom.gateway.gateway import Gateway
from rankloom.registry import Registry
from served import load

pytestmark = pytest.mark.slow

PYTHON_CLIENTS = {
    "openai_python": ("openai",),
    "instructor_extract": ("instructor",),
    "langchain_tools": ("langchain", "langchain_openai"),
    "pydantic_ai_agent": ("pydantic_ai", "openai"),
    "autogen_agent": ("autogen_agentchat", "autogen_ext", "openai"),
}
"""Script -> the modules that its interpreter needs."""
NODE_CLIENTS = {"openai_node": ("openai", "zod"), "ai_sdk": ("ai", "@ai-sdk/openai-compatible", "zod")}
"""Script -> the packages that its folder needs."""
LIMIT_S = 300


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[str]:
    """Serve a base whose template writes calls as Hermes does, on a tokenizer that knows none of its marks."""
    folder = tmp_path_factory.mktemp("clients")
    base = load(write_base(tiny_llama, folder / "base", "hermes_spelt"))
    replicas = OneEngine(base, Registry(folder / "registry"))
    config = parse(ServeConfig, {"base": base.id, "limits": {"max_tokens": 2000, "timeout_s": LIMIT_S}})
    with listening(Gateway(config, Registry(folder / "registry"), replicas)) as served:
        yield f"{served}/v1"
    asyncio.run(replicas.engine.close())


def run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("script", PYTHON_CLIENTS)
def test_a_python_client_does_its_examples(url: str, script: str) -> None:
    python = find_python(*PYTHON_CLIENTS[script])
    run([python, Path(__file__).with_name(f"{script}.py"), url])


@pytest.mark.parametrize("script", NODE_CLIENTS)
def test_a_node_client_does_its_examples(url: str, script: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("RANKLOOM_TEST_NODE", "."), "node_modules").absolute()
    missing = [each for each in NODE_CLIENTS[script] if not (folder / each).is_dir()]
    if missing or shutil.which("node") is None:
        pytest.skip(f"needs node, and {' and '.join(missing)} in RANKLOOM_TEST_NODE")
    (tmp_path / "node_modules").symlink_to(folder)  # a module looks for others beside itself
    shutil.copy(Path(__file__).with_name(f"{script}.mjs"), tmp_path)
    run(["node", tmp_path / f"{script}.mjs", url])
