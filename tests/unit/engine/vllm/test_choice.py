"""Which engine `engine.type=auto` takes, for what is to be served and where."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rankloom.config import parse
from rankloom.config.engine import AutoEngineConfig, EngineConfig, VllmConfig
from rankloom.config.serve import ServeConfig
from rankloom.deploy.app import resolve_engine
from rankloom.engine.vllm.choice import choose_engine
from rankloom.engine.vllm.server import PYTHON
from rankloom.registry import BaseModelRef, Draft, Registry, Versions
from served import write_adapter


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter that says it has vLLM."""
    file = tmp_path / "python"
    file.write_text("#!/bin/sh\necho 0.99\n")
    file.chmod(0o755)
    return str(file)


def test_vllm_is_taken_on_a_gpu_with_its_environment(monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    monkeypatch.delenv(PYTHON, raising=False)
    auto = AutoEngineConfig(bank=EngineConfig(max_queue=3), vllm=VllmConfig(max_queue=4))
    assert choose_engine(auto, on_gpu=False) == (auto.bank, "bank, as there is no GPU")
    engine, why = choose_engine(auto, on_gpu=True)
    assert engine is auto.bank
    assert why.startswith("bank, as vLLM has no environment here (engine.python: not given")
    monkeypatch.setenv(PYTHON, python)
    assert choose_engine(auto, on_gpu=True) == (auto.vllm, f"vllm, as there is a GPU and {python} has vLLM 0.99")
    assert choose_engine(auto, on_gpu=False)[0] is auto.bank
    monkeypatch.setenv(PYTHON, sys.executable)
    given = AutoEngineConfig(vllm=VllmConfig(python=python))
    assert choose_engine(given, on_gpu=True)[0] is given.vllm


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"adapters": ["plain"]}, "vllm, as there is a GPU"),
        ({"adapters": "all"}, "vllm, as there is a GPU"),
        ({"adapters": "all", "quantization": "nf4"}, "bank, as vLLM serves a base as it is stored, not with .* nf4"),
        ({"adapters": ["plain", "made"]}, r"bank, as made@1 was made by full, and vLLM serves LoRA and DoRA alone"),
        ({"adapters": ["high"]}, r"bank, as high@1 is of rank 24, above engine\.vllm\.max_lora_rank=16"),
        ({"adapters": ["high"], "max_lora_rank": 32}, "vllm, as there is a GPU"),
    ],
)
def test_vllm_is_not_taken_for_what_it_can_not_serve(
    tiny_llama: Path, tmp_path: Path, python: str, change: dict[str, Any], why: str
) -> None:
    registry = Registry(tmp_path / "registry")
    for name, servable, method in (
        ("plain", "itself", {"type": "lora", "rank": 8}),
        ("made", "extracted", {"type": "full"}),
        ("high", "itself", {"type": "dora", "rank": 24}),
    ):
        write_adapter(tiny_llama, tmp_path / name, "rank1")
        (tmp_path / name / "README.md").unlink(missing_ok=True)
        draft = Draft(
            method=method["type"],
            base=BaseModelRef(id="org/base", fingerprint="f", quantization="none"),
            servable=servable,
            trial={"method": method},
            data_fingerprint=None,
            scorecard=None,
            versions=Versions(rankloom="0", torch="0", transformers="0", peft="0"),
        )
        registry.publish(name, tmp_path / name, draft)
    vllm = {"python": python, "max_lora_rank": change.pop("max_lora_rank", 16)}
    config = parse(ServeConfig, {"base": "org/base", "engine": {"type": "auto", "vllm": vllm}} | change)
    resolved, engine, said = resolve_engine(config, registry, on_gpu=True)
    assert resolved.engine is engine
    assert isinstance(engine, VllmConfig if why.startswith("vllm") else EngineConfig)
    assert said is not None
    assert re.match(why, said), said
    assert resolve_engine(resolved, registry, on_gpu=True) == (resolved, engine, None)
