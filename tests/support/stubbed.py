"""What tests on `stub_vllm` share: its interpreter, and adapters whose probes say what its model does with them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rankloom.adapters.probe import write_probe
from served import load, publish, write_adapter
from stub_vllm.vllm.entrypoints.openai.api_server import logprobs

STUB = Path(__file__).with_name("stub_vllm")


def make_python(folder: Path) -> str:
    """Make an interpreter in whose environment the stand-in is installed."""
    file = folder / "python"
    run = "import runpy, sys; sys.path.insert(0, sys.argv[1]); del sys.argv[:3]; "
    run += "sys.argv[0] == '-c' and (print('0.99'), sys.exit()); runpy.run_path(sys.argv[0], run_name='__main__')"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{run}" {STUB} "$@"\n')
    file.chmod(0o755)
    return str(file)


def publish_probed(base: Path, root: Path, work: Path, kind: str, rank: int, name: str = "") -> str:
    """Publish an adapter whose probe says what the stand-in's model does with an adapter of that rank."""
    folder = work / (name or kind)
    write_adapter(base, folder, kind)
    write_probe(folder, [7, 9], torch.tensor(logprobs(rank)), torch.tensor(logprobs(0)))
    return publish(root, load(base), name or kind, folder, probe=False)
