"""Speed of the step alone: one step of eight trials in a host against eight steps of single trials, by batch size.

    python benchmarks/step_speed.py [--model tiny|builtin:smollm2] [--rounds 3] [--out RESULTS/DATE-step-speed]

Three ways take turns in one process, so that other load on the machine affects all of them: `TrialHost.step` with eight
members, eight steps of rankloom's own loop, and eight of a plain loop over a PEFT model with torch's AdamW, on padded
batches. All train LoRA of rank 8. Figures are real tokens per second, medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from common import RESULTS, machine, tiny_llama, today, write_json

from rankloom.config import TrialConfig, parse
from rankloom.data import Cursor, TaskData, collate, load_data
from rankloom.models import Base, choose_auto_dtype, load_base, load_tokenizer
from rankloom.training.fused.host import TrialHost
from rankloom.training.loop import TrainingLoop
from rankloom.training.precision import autocast
from rankloom.training.session import LocalSession

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION = choose_auto_dtype(DEVICE)
NUM_MEMBERS = 8
Run = Callable[[], int]
"""Trains eight steps; returns the number of tokens."""


def trial_of(model: str, batch_size: int, seed: int = 0) -> TrialConfig:
    tree = {
        "name": f"trial-{seed}",
        "seed": seed,
        "model": {"id": model},
        "data": {"template": "plain"},
        "method": {"type": "lora", "rank": 8},
        "optim": {"batch_size": batch_size, "schedule": "constant", "warmup_fraction": 0},
        "budget": {"steps": 10_000},
    }
    return parse(TrialConfig, tree)


def base_of(trial: TrialConfig) -> Base:
    return load_base(trial.model, trial.quantization, device=DEVICE)


def fused(model: str, batch_size: int, data: TaskData) -> Run:
    base = base_of(trial_of(model, batch_size))
    host = TrialHost(
        base, data, num_slots=NUM_MEMBERS, max_rank=8, token_budget=2**20, with_magnitudes=False, precision=PRECISION
    )
    for seed in range(NUM_MEMBERS):
        host.admit(f"member-{seed}", trial_of(model, batch_size, seed))

    def run() -> int:
        host.step()
        assert host.last_plan is not None
        assert len(host.last_plan.shares) == NUM_MEMBERS
        return host.last_plan.num_tokens

    return run


def solo_loop(model: str, batch_size: int, data: TaskData, scratch: Path) -> Run:
    trial = trial_of(model, batch_size)
    loop = TrainingLoop(trial, base_of(trial), data, LocalSession(scratch, device=DEVICE), PRECISION)

    def run() -> int:
        before = loop.progress.tokens
        for _ in range(NUM_MEMBERS):
            loop.step()
        return loop.progress.tokens - before

    return run


def solo_peft(model: str, batch_size: int, data: TaskData) -> Run:
    trial = trial_of(model, batch_size)
    base = load_plain(trial)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    adapted = peft.get_peft_model(base, config)
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-4, weight_decay=0)
    cursor = Cursor(data.train.lengths, batch_size, seed=0, group_by_length=True)
    pad = int(load_tokenizer(trial.model).pad_token_id)

    def run() -> int:
        tokens = 0
        for _ in range(NUM_MEMBERS):
            batch = collate([data.train[i] for i in cursor.next()], pad).to(DEVICE)
            labels = batch.input_ids_BT.masked_fill(batch.loss_weights_BT == 0, -100)
            with autocast(DEVICE, PRECISION):
                found = adapted(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=labels)
            found.loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens += batch.num_tokens
        return tokens

    return run


def load_plain(trial: TrialConfig) -> Any:
    """Load the base as transformers does."""
    from transformers import AutoModelForCausalLM

    from rankloom.models import locate_folder

    model = AutoModelForCausalLM.from_pretrained(locate_folder(trial.model), dtype=PRECISION)
    return model.to(DEVICE)


def measure(model: str, batch_size: int, data: TaskData, rounds: int, scratch: Path) -> dict[str, Any]:
    ways: dict[str, Run] = {
        "host": fused(model, batch_size, data),
        "loop": solo_loop(model, batch_size, data, scratch),
        "peft": solo_peft(model, batch_size, data),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            tokens = run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if index:  # the first round warms up
                rates[name].append(tokens / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "batch_size": batch_size,
        "tokens_per_s": {name: round(value, 1) for name, value in medians.items()},
        "host_over_loop": round(medians["host"] / medians["loop"], 2),
        "host_over_peft": round(medians["host"] / medians["peft"], 2),
    }


def render(figures: dict[str, Any]) -> str:
    lines = ["# Eight steps in a host, and one by one", "", f"{figures['date']}, {figures['machine']}.", ""]
    lines += [(__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip(), ""]
    for model, found in figures["models"].items():
        lines += [f"## {model}", "", f"Command: `{found['command']}`, {found['threads']} thread(s).", ""]
        lines += ["| batch size of a trial | host, tokens/s | loop | PEFT | host / loop | host / PEFT |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in found["rows"]:
            rates = " | ".join(f"{row['tokens_per_s'][name]:.0f}" for name in ("host", "loop", "peft"))
            ratios = f"{row['host_over_loop']:.2f}x | **{row['host_over_peft']:.2f}x**"
            lines.append(f"| {row['batch_size']} | {rates} | {ratios} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"{today()}-step-speed", help="file to write, without .json and .md"
    )
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_llama(Path(scratch) / "model") if options.model == "tiny" else options.model
        trial = trial_of(model, 1)
        data = load_data(trial.data, load_tokenizer(trial.model))
        for batch_size in options.batch_sizes:
            rows.append(measure(model, batch_size, data, options.rounds, Path(scratch)))
            print(rows[-1], flush=True)
    found = {
        "command": " ".join(["python", "benchmarks/step_speed.py", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    path = options.out.with_suffix(".json")
    before = json.loads(path.read_text())["models"] if path.is_file() else {}
    figures = {"date": today(), "machine": machine(), "models": before | {options.model: found}}
    write_json(path, figures)
    options.out.with_suffix(".md").write_text(render(figures))
    print(render(figures))


if __name__ == "__main__":
    main()
