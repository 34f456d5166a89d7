"""Training tokens/s of rankloom's loop against transformers' Trainer with PEFT, side by side in one process.

    python benchmarks/train_speed.py [--rounds 5] [--steps 6] [--batch-size 8]

Both train the same LoRA from the same start on the same batches, in alternating rounds, so that other load on the
machine affects both; the ratio of the medians is the result. A third column gives Trainer random batches, as its
default sampler does, to show the gain of length grouping. Padding does not count as tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from common import machine, today, write_json

from rankloom.config import TrialConfig, parse
from rankloom.data import Batch, Cursor, collate, load_data
from rankloom.models import choose_auto_dtype, load_base, load_tokenizer
from rankloom.training.loop import TrainingLoop
from rankloom.training.session import LocalSession

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def trial_of(steps: int, batch_size: int) -> TrialConfig:
    return parse(
        TrialConfig,
        {
            "name": "train-speed",
            "data": {"instruction": "Classify the customer's message."},
            "optim": {"batch_size": batch_size, "schedule": "constant", "warmup_fraction": 0},
            "budget": {"steps": steps},
        },
    )


class OurLoop:
    """rankloom's loop: `TrainingLoop.step`."""

    def __init__(self, trial: TrialConfig, data: Any, scratch: Path) -> None:
        base = load_base(trial.model, trial.quantization, device=DEVICE)
        self.loop = TrainingLoop(trial, base, data, LocalSession(scratch, device=DEVICE), choose_auto_dtype(DEVICE))
        self.losses: list[float] = []
        self.loop.session.emit = lambda event: self.losses.append(event.loss)  # type: ignore[method-assign]

    def run(self, steps: int) -> float:
        """Return the seconds for `steps` steps."""
        before = self.loop.progress.train_s
        for _ in range(steps):
            self.loop.step()
        return self.loop.progress.train_s - before


class HfTrainer:
    """transformers.Trainer with a PEFT model and prepared batches."""

    def __init__(self, trial: TrialConfig, scratch: Path) -> None:
        base = load_base(trial.model, trial.quantization, device=DEVICE)
        torch.manual_seed(trial.seed)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=trial.method.rank,
            lora_alpha=trial.method.alpha,
            target_modules="all-linear",  # type: ignore[union-attr]
        )
        self.model = peft.get_peft_model(base.model, config)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=trial.optim.learning_rate, weight_decay=0
        )
        self.scratch, self.losses = scratch, []

    def run(self, batches: list[Batch]) -> float:
        items = [
            {
                "input_ids": batch.input_ids_BT,
                "attention_mask": batch.attention_mask_BT,
                "labels": batch.input_ids_BT.masked_fill(batch.loss_weights_BT == 0, -100),
            }
            for batch in batches
        ]
        arguments = transformers.TrainingArguments(
            output_dir=str(self.scratch), per_device_train_batch_size=1, num_train_epochs=1, max_grad_norm=1.0,
            lr_scheduler_type="constant", save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True,
            train_sampling_strategy="sequential", use_cpu=DEVICE.type == "cpu", remove_unused_columns=False,
            bf16=DEVICE.type == "cuda",
        )  # fmt: skip
        clock = _Clock()
        trainer = transformers.Trainer(
            model=self.model, args=arguments, train_dataset=items, data_collator=lambda one: one[0],
            optimizers=(self.optimizer, None), callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        self.losses += [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return clock.seconds


class _Clock(transformers.TrainerCallback):
    """Times only the steps, without Trainer's set-up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.monotonic() - self.started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=6, help="optimiser steps per round")
    arguments.add_argument("--batch-size", type=int, default=8)
    arguments.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = arguments.parse_args()
    transformers.logging.set_verbosity_error()
    trial = trial_of(options.rounds * options.steps, options.batch_size)
    tokenizer = load_tokenizer(trial.model)
    data = load_data(trial.data, tokenizer)

    def drawn(group_by_length: bool) -> list[Batch]:
        cursor = Cursor(data.train.lengths, options.batch_size, seed=trial.seed, group_by_length=group_by_length)
        pad = int(tokenizer.pad_token_id)
        rows = [cursor.next() for _ in range(options.rounds * options.steps)]
        return [collate([data.train[i] for i in indices], pad) for indices in rows]

    grouped, random = drawn(True), drawn(False)
    rates: dict[str, list[float]] = {"rankloom": [], "trainer": [], "trainer, random batches": []}
    with tempfile.TemporaryDirectory() as scratch:
        ours = OurLoop(trial, data, Path(scratch))
        trainer, shuffled = HfTrainer(trial, Path(scratch)), HfTrainer(trial, Path(scratch))
        for index in range(options.rounds):
            part = slice(index * options.steps, (index + 1) * options.steps)
            tokens, other = sum(b.num_tokens for b in grouped[part]), sum(b.num_tokens for b in random[part])
            rates["rankloom"].append(tokens / ours.run(options.steps))
            rates["trainer"].append(tokens / trainer.run(grouped[part]))
            rates["trainer, random batches"].append(other / shuffled.run(random[part]))
    apart = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, trainer.losses, strict=True))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    figures = {
        "date": today(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "tokens_per_s": {name: round(value, 1) for name, value in medians.items()},
        "rankloom_over_trainer": round(medians["rankloom"] / medians["trainer"], 3),
        "rankloom_over_trainer_by_round": [
            round(a / b, 3) for a, b in zip(rates["rankloom"], rates["trainer"], strict=True)
        ],
        "rankloom_over_trainer_random_batches": round(medians["rankloom"] / medians["trainer, random batches"], 3),
        "largest_relative_loss_difference": float(f"{apart:.2g}"),
    }
    print(json.dumps(figures, indent=2))
    if options.out:
        write_json(options.out, figures)


if __name__ == "__main__":
    main()
