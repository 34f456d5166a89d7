"""Helpers of the benchmarks: a tiny model, an endpoint, the machine in words, memory of processes, results on disk."""

from __future__ import annotations

import csv
import json
import os
import platform
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
INTENTS = Path(__file__).parents[1] / "platform/rankloom/data/builtin/bank-intents/train.csv"
SAMPLE_EVERY_S = 0.5


def make_tokenizer() -> Any:
    """Train a tokenizer for the built-in data's words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<pad>", "<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    with INTENTS.open(encoding="utf-8") as file:
        raw.train_from_iterator([" ".join(row) for row in csv.reader(file)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>")


def tiny_llama(folder: Path, *, num_layers: int = 2, hidden: int = 64) -> str:
    """Save a random Llama, too small for its arithmetic to matter, with a tokenizer for the built-in data's words."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
        bos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # larger than the default initialisation, so that an adapter has an effect
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def machine() -> str:
    """Describe the device in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as Markdown."""
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=MARKDOWN)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console(width=1000, file=StringIO())
    console.print(table)
    return console.file.getvalue().strip()  # type: ignore[attr-defined]


def write_json(path: Path, figures: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def endpoint(config: dict[str, Any], address: tuple[str, int] | None = None) -> Iterator[str]:
    """Serve a deployment on a local Ray of two cores, and yield its URL at Ray Serve's proxy.

    Args:
        address: where the ingress is to listen too, as that of `rankloom serve` does on a Ray of its own.
    """
    import ray
    from ray import serve

    from rankloom.config import parse
    from rankloom.config.serve import ServeConfig
    from rankloom.deploy.app import GRPC, build_application

    os.environ.update(GRPC)
    port = find_free_port()
    source = {"PYTHONPATH": str(Path(__file__).resolve().parents[1] / "platform")}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": source}
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_application(parse(ServeConfig, config, "serve"), address))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


class MemoryOfWorkers:
    """Samples the memory of all Ray workers below a process, inside the context, and keeps the peak of their sum.

    Memory is PSS, which divides a shared page among its processes, so that it counts once.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak_bytes = 0
        self.at_peak: dict[str, int] = {}
        """Process name -> bytes at the peak."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryOfWorkers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            held: dict[str, int] = {}
            for name, pid in workers_below(self.pid):
                held[name] = held.get(name, 0) + _pss_bytes(pid)
            if sum(held.values()) > self.peak_bytes:
                self.peak_bytes, self.at_peak = sum(held.values()), held


def workers_below(pid: int) -> list[tuple[str, int]]:
    """Return (name, pid) of Ray's worker processes among the descendants of a process."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
                names[int(folder.name)] = (folder / "cmdline").read_text().split("\0")[0]
            except OSError:
                continue  # it ended meanwhile
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])

    def below(child: int) -> bool:
        return child == pid or (child in parents and below(parents[child]))

    return [(name, child) for child, name in names.items() if name.startswith("ray::") and below(child)]


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def since(started: float) -> float:
    return round(time.monotonic() - started, 2)
