"""Two workers equal one, to the scorecard: real processes over gloo.

DDP for adapters, GaLore and LISA, FSDP2 for full fine-tuning.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from rankloom.config import TrialConfig, parse
from rankloom.evals.own_metric import Prediction
from rankloom.events import Evaluated, Event, StepFinished, to_dict
from rankloom.training.run import run_trial
from rankloom.training.session import LocalSession

CPU = torch.device("cpu")
METHODS: list[dict[str, Any]] = [
    {"type": "lora", "rank": 4},
    {"type": "dora", "rank": 4},
    {"type": "adalora", "initial_rank": 6, "target_rank": 3, "interval": 1},
    {"type": "full"},
    # where two singular values are almost alike at the cut, rounding decides between subspaces: at rank 8 they may be
    {"type": "galore", "rank": 4, "interval": 3},
    {"type": "lisa", "num_layers": 1, "interval": 2},
]


EXPERTS = {"type": "lora", "rank": 4, "experts": True}
"""On a mixture with so many that some get no token of a worker's rows."""


def trial_of(
    model: Path,
    method: dict[str, Any],
    name: str = "",
    *,
    train: str = "builtin:bank-intents",
    metric: str = "accuracy",
    **compute: Any,
) -> TrialConfig:
    return parse(
        TrialConfig,
        {
            "name": name or method["type"],
            "model": {"id": str(model)},
            "data": {
                "train": train,
                "max_train_rows": 43,
            },  # no multiple of the batch: the last one leaves a worker short
            "method": method,
            # a large epsilon: Adam divides by almost nothing where a gradient is almost nothing
            "optim": {"learning_rate": 2e-3, "batch_size": 6, "accumulation": 2, "eps": 1e-4},
            "budget": {"steps": 9},
            "compute": compute,
            "eval": {"every": 9, "max_rows": 15, "max_test_rows": 14, "metric": metric, "latency": False},
            "output": {"publish": False},
        },
    )


class WorkerSession(LocalSession):
    """LocalSession for one of several processes; rank 0 keeps the checkpoints."""

    def __init__(self, run: Path, rank: int, world_size: int, events: list[Event]) -> None:
        super().__init__(run, device=CPU, on_event=events.append)
        self.rank, self.world_size = rank, world_size

    def save_checkpoint(self, folder: Path | None, metrics: dict[str, float]) -> None:
        if folder is not None:
            super().save_checkpoint(folder, metrics)
        if self.world_size > 1:
            dist.barrier()


def shares(rows: Sequence[Prediction]) -> list[float]:
    """A metric of the user's own that depends on the rows' order."""
    return [(n + 1) * len(row.prompt) / 1000 + (row.reference == row.prediction) for n, row in enumerate(rows)]


def train_all(rank: int, world_size: int, port: int, trials: list[TrialConfig], root: Path) -> None:
    """Train every trial under `root/<method>`; one of `world_size` processes."""
    torch.set_num_threads(1)
    if world_size > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    for trial in trials:
        run = root / trial.name
        run.mkdir(parents=True, exist_ok=True)
        events: list[Event] = []
        result = run_trial(trial, WorkerSession(run, rank, world_size, events))
        assert bool(result) == (rank == 0)
        if rank == 0:
            torch.save([to_dict(e) for e in events if isinstance(e, StepFinished | Evaluated)], run / "events.pt")
            (run / "scorecard.json").write_text(result["scorecard"].model_dump_json())
    if world_size > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(
    tiny_llama: Path, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Number of workers -> the folder with all methods' runs; the second of two is a process of its own."""
    mixture = tiny_model("mixture")
    pairs = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": f"yes {n}"}) + "\n" for n in range(60)))
    trials = [
        *(trial_of(tiny_llama, method) for method in METHODS),
        trial_of(tiny_llama, {"type": "full"}, "full-bf16", precision="bf16"),
        trial_of(mixture, EXPERTS, "experts"),
        trial_of(mixture, EXPERTS, "experts-recomputed", activation_checkpointing=True),
        trial_of(tiny_llama, {"type": "lora", "rank": 4}, "own", metric=f"{__name__}:shares"),
        trial_of(tiny_llama, {"type": "full"}, "own-sharded", train=str(pairs), metric=f"{__name__}:shares"),
    ]
    roots = {n: tmp_path_factory.mktemp(f"workers-{n}") for n in (1, 2)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    train_all(0, 1, port, trials, roots[1])
    second = mp.get_context("spawn").Process(target=train_all, args=(1, 2, port, trials, roots[2]))
    second.start()
    train_all(0, 2, port, trials, roots[2])
    second.join()
    assert second.exitcode == 0
    return roots


@pytest.mark.parametrize(
    "kind", [*(method["type"] for method in METHODS), "experts", "experts-recomputed", "own", "own-sharded"]
)
def test_two_workers_equal_one(kind: str, trained: dict[int, Path]) -> None:
    one, two = (torch.load(trained[n] / kind / "events.pt") for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.get("accuracy") == pytest.approx(b.get("accuracy"))
        assert a.get("metric") == pytest.approx(b.get("metric"))
        assert a.get("tokens") == b.get("tokens")
    assert (one[0].get("metric") is not None) == kind.startswith("own")
    scores = [json.loads((trained[n] / kind / "scorecard.json").read_text())["result"]["loss"] for n in (1, 2)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    whole, split = (load_file(trained[n] / kind / "checkpoints" / "9" / "weights.safetensors") for n in (1, 2))
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, atol=3e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_shards_are_gathered_in_bf16_and_add_up_in_fp32(trained: dict[int, Path]) -> None:
    one, two = (torch.load(trained[n] / "full-bf16" / "events.pt") for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
    weights = load_file(trained[2] / "full-bf16" / "checkpoints" / "9" / "weights.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())
