"""What `gpu.py` compares with: PEFT one trial after the other, in a CUDA graph, and as eight processes at once.

Each is bf16 autocast over a bf16 base, with fp32 adapters and torch's fused AdamW, as a careful user writes it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from gpu_bench import Bench
from random_models import random_data, random_model
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rankloom.data import Row, TaskData

NUM_PROCESSES = 8
DTYPE = torch.bfloat16
START_S = 45.0
"""How long the processes may take to start."""


class PeftTrial:
    """One trial of PEFT on a base that it has for itself until `close`."""

    def __init__(self, bench: Bench, name: str, data: TaskData, batch_size: int, *, rank: int = 16, dora: bool = False):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=dora
        )
        self.device, self.data, self.batch_size = bench.device, data, batch_size
        self.model = peft.get_peft_model(random_model(bench.shape(name), bench.device, DTYPE), config)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        for weight in self.weights:
            weight.data = weight.data.float()
        on_gpu = bench.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.weights, lr=3e-4, weight_decay=0, fused=True, capturable=on_gpu)
        self._next = 0

    def rows(self) -> Sequence[Row]:
        indices = [(self._next + i) % len(self.data.train) for i in range(self.batch_size)]
        self._next += self.batch_size
        return [self.data.train[i] for i in indices]

    def step(self) -> int:
        """Train on the next rows; returns the number of tokens, without padding."""
        rows = self.rows()
        ids, labels = pad(rows, max(len(row.input_ids) for row in rows))
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            mask[i, : len(row.input_ids)] = 1
        self.compute(ids.to(self.device), labels.to(self.device), mask.to(self.device))
        return sum(len(row.input_ids) for row in rows)

    def compute(self, ids: Tensor, labels: Tensor, mask: Tensor | None) -> None:
        with torch.autocast(self.device.type, DTYPE, cache_enabled=False):
            loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=mask is not None)


def pad(rows: Sequence[Row], width: int) -> tuple[Tensor, Tensor]:
    """Return the ids and labels [B, width] of rows, padded on the right."""
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[i, row.prompt_length : len(row.input_ids)] = ids[i, row.prompt_length : len(row.input_ids)]
    return ids, labels


def _causal(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: None, **settings: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, None, **settings | {"is_causal": True})


ALL_ATTENTION_FUNCTIONS.register("benchmark_causal", _causal)  # transformers builds no mask for a name of others


def graphed(trial: PeftTrial, width: int) -> Callable[[], int]:
    """Capture a trial's whole step at a fixed width; on a CPU the step is computed at that width without a graph.

    Rows need no mask: they are padded on the right, and attention is causal.
    """
    ids, labels = (t.to(trial.device) for t in pad(trial.rows(), width))
    trial.model.config._attn_implementation = "benchmark_causal"

    def compute() -> None:
        trial.compute(ids, labels, None)

    replay = compute
    if trial.device.type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            compute()
        replay = graph.replay

    def step() -> int:
        rows = trial.rows()
        for target, new in zip((ids, labels), pad(rows, width), strict=True):
            target.copy_(new)
        replay()
        return sum(len(row.input_ids) for row in rows)

    return step


@contextmanager
def mps() -> Iterator[dict[str, str] | None]:
    """Run NVIDIA's MPS in a folder of its own, and yield its clients' variables; None where there is no MPS."""
    if shutil.which("nvidia-cuda-mps-control") is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        control = ["nvidia-cuda-mps-control"]
        started = subprocess.run([*control, "-d"], env=os.environ | variables, capture_output=True, check=False)
        try:
            yield variables if started.returncode == 0 else None
        finally:
            subprocess.run(
                control, input=b"quit\n", env=os.environ | variables, capture_output=True, check=False, timeout=20
            )


def processes_at_once(bench: Bench, name: str, num: int, seconds: float, variables: dict[str, str]) -> float:
    """Return the tokens per second of `num` processes that train a trial each, all at once, on one device.

    Raises:
        RuntimeError: not all of them started in time, or one failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, name, str(seconds), scratch, *(["--dry"] if bench.dry else [])]
        environment = os.environ | variables | {"OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
            for _ in range(num)
        ]
        try:
            deadline = time.monotonic() + (300 if bench.dry else min(START_S, bench.left_s))
            while len(list(Path(scratch).glob("ready-*"))) < num:
                if time.monotonic() > deadline or any(process.poll() for process in running):
                    ended = next((p for p in running if p.poll()), None)
                    raise RuntimeError(ended.communicate()[1][-300:] if ended else f"{num} processes did not start")
                time.sleep(0.05)
            (Path(scratch) / "go").touch()
            answers = [process.communicate(timeout=seconds + 60)[0] for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
    return sum(float(answer.split()[-1]) for answer in answers)


def train_alone(name: str, seconds: float, scratch: Path, *, dry: bool) -> None:
    """Be one of the processes: train from the moment that all are ready, and print the tokens per second."""
    bench = Bench(scratch / f"out-{os.getpid()}", dry=dry, limit_s=600)
    trial = PeftTrial(bench, name, random_data(*((5, 12) if dry else (64, 256))), 1)
    for _ in range(1 if dry else 5):
        trial.step()
    bench.wait()
    (scratch / f"ready-{os.getpid()}").touch()
    while not (scratch / "go").exists():
        time.sleep(0.005)
    started, num_tokens = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        num_tokens += trial.step()
        bench.wait()
    print(num_tokens / (time.perf_counter() - started))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("seconds", type=float)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    train_alone(options.name, options.seconds, options.scratch, dry=options.dry)
