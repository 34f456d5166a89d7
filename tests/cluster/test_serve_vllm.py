"""A deployment on vLLM, on a real local Ray: RANKLOOM_VLLM_PYTHON=vllm-env/bin/python names vLLM's interpreter."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from openai import APIError, OpenAI, UnprocessableEntityError
from test_serve_app import serve_app

from rankloom.config.model import ModelConfig
from rankloom.engine.vllm import die_with_parent
from rankloom.engine.vllm.server import PYTHON
from rankloom.models import locate_folder
from served import load, publish, write_adapter

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no environment with vLLM"),
]


def vllm_servers() -> list[int]:
    """Process ids, each of a server and not of what it started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if os.fsencode(die_with_parent.__file__) in words:
                found.append(int(folder.name))
    return found


def test_adapters_on_vllm_and_a_server_that_dies_is_replaced(tmp_path: Path, local_serve: str) -> None:
    base, root = locate_folder(ModelConfig()), tmp_path / "registry"
    for kind in ("lora", "dora", "wide"):
        write_adapter(base, tmp_path / kind, kind)
        publish(root, load(base), kind, tmp_path / kind)
    engine = {"type": "vllm", "max_model_len": 512, "kv_cache_gib": 0.5, "args": ["--enforce-eager"]}
    config = {"base": str(base), "registry": str(root), "engine": engine, "pinned": ["lora"]}
    with serve_app(config):
        client = OpenAI(base_url=f"{local_serve}/v1", api_key="none", max_retries=0)

        def ask(model: str) -> str:
            answer = client.completions.create(model=model, prompt="A lost card", max_tokens=8, temperature=0)
            return answer.choices[0].text

        plain, adapted = ask(str(base)), ask("lora")
        assert plain != adapted
        assert ask("dora") not in (plain, adapted)
        told = client.completions.with_raw_response.create(
            model="dora", prompt="A lost card", max_tokens=8, temperature=0, extra_body={"min_tokens": 8}
        )  # passes through
        assert told.headers["x-rankloom-adapter"] == "dora"
        assert (told.parse().choices[0].text, told.parse().model) == (ask("dora"), "dora")
        with pytest.raises(UnprocessableEntityError, match=r"engine\.max_lora_rank=16"):
            ask("wide")
        (old,) = vllm_servers()
        os.kill(old, signal.SIGKILL)
        deadline = time.monotonic() + 400
        while True:
            try:
                assert ask("lora") == adapted
                break
            except APIError:
                assert time.monotonic() < deadline
                time.sleep(1)
        assert old not in vllm_servers()
    deadline = time.monotonic() + 60
    while vllm_servers():
        assert time.monotonic() < deadline
        time.sleep(0.5)
