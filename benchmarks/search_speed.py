"""A study against the usual code: Ray Tune with one process per trial, PEFT and transformers' Trainer.

    python benchmarks/search_speed.py --workload tiny|smollm2 [--rounds 1] [--out benchmarks/results/DATE-search-speed]

Both sides train the same LoRA trials on the same batches in the same order, evaluate each at its end on the same rows
and save its adapter. A round runs one side after the other, each in a fresh driver with its own local Ray; the clock
starts when Ray is up and stops at the last trial's result, so imports, processes and loading count on both sides. The
baseline runs one trial per core at once, which is its fastest on a CPU.

Memory is the peak PSS of a side's Ray workers. With the larger model, the baseline also runs with all its trials at
once, as the study does, to show the cost of equal concurrency.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import RESULTS, MemoryOfWorkers, machine, since, tiny_llama, today, write_json

from rankloom.config import StudyConfig, dump, parse
from rankloom.events import Event, TrialEnded, TrialEvaluated

EVAL_ROWS = 32
MEMORY_STEPS = 6


@dataclass(frozen=True)
class Workload:
    """The trials that both sides train."""

    model: str
    num_trials: int
    steps: int
    batch_size: int


WORKLOADS = {
    "tiny": Workload("tiny", num_trials=16, steps=300, batch_size=1),
    "smollm2": Workload("builtin:smollm2", num_trials=8, steps=30, batch_size=2),
}


def study_of(workload: Workload, root: Path) -> StudyConfig:
    """Return a study with all trials as warm starts, because a search would draw others."""
    grid = itertools.product((1.0e-3, 5.0e-4, 2.0e-3, 2.5e-4), (8, 16, 4, 2))
    trials = [
        {"method": {"type": "lora", "rank": rank, "alpha": 2 * rank}, "optim": {"learning_rate": rate}}
        for rate, rank in itertools.islice(itertools.cycle(grid), workload.num_trials)
    ]
    trial = {
        "model": {"id": workload.model},
        "data": {"template": "plain"},
        "optim": {"batch_size": workload.batch_size, "schedule": "constant", "warmup_fraction": 0},
        "budget": {"steps": workload.steps},
        "eval": {"every": workload.steps, "max_rows": EVAL_ROWS, "max_test_rows": 4, "base": False, "latency": False},
        "output": {"root": str(root)},
    }
    return parse(
        StudyConfig,
        {
            "name": "search-speed",
            "trial": trial,
            "space": [{"method": {"type": "lora"}, "optim": {"learning_rate": {"choice": [1.0e-3, 5.0e-4]}}}],
            "search": {"num_trials": workload.num_trials, "warm_start": trials},
            "scheduler": {"type": "fifo"},
            "hosts": {"num_slots": workload.num_trials, "num_waiting": 0},
            "final": {"top_k": 1, "publish": False},
        },
    )


def prepare(study: StudyConfig, folder: Path) -> None:
    """Write the tokenised batches of every trial, so that the baseline need not render data."""
    import torch

    from rankloom.data import Cursor, collate, load_data
    from rankloom.models import load_tokenizer, locate_folder

    trial = study.baseline
    tokenizer = load_tokenizer(trial.model)
    data, pad = load_data(trial.data, tokenizer), int(tokenizer.pad_token_id)
    cursor = Cursor(
        data.train.lengths, trial.optim.batch_size, seed=trial.seed, group_by_length=trial.optim.group_by_length
    )

    def item(rows: list[Any]) -> dict[str, Any]:
        batch = collate(rows, pad)
        labels = batch.input_ids_BT.masked_fill(batch.loss_weights_BT == 0, -100)
        return {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT, "labels": labels}

    train = [item([data.train[i] for i in cursor.next()]) for _ in range(trial.budget.steps or 0)]
    validation = [item(list(data.validation.select(EVAL_ROWS, seed=0)))]
    torch.save({"train": train, "validation": validation}, folder / "batches.pt")
    trials = [dump(study.resolve({"warm_start": i}, i)) for i in range(study.num_trials)]
    write_json(folder / "trials.json", {"model": str(locate_folder(trial.model)), "trials": trials})


def by_study(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the study; return the seconds to the last trial's end, and each trial's validation loss."""
    import ray

    from rankloom.search.study import tune

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    study = parse(StudyConfig, spec["study"])
    started = time.monotonic()
    found: dict[str, Any] = {"losses": [None] * study.num_trials}

    def take(event: Event) -> None:
        if isinstance(event, TrialEvaluated):
            found["losses"][int(event.name.rpartition("-")[2])] = event.loss
            found.setdefault("first_report_s", since(started))
        elif isinstance(event, TrialEnded):
            found["makespan_s"] = since(started)
            if event.error:
                raise SystemExit(f"{event.name}: {event.error}")

    result = tune(study, on_event=take)
    hosts = [asdict(host) for host in result.hosts]
    for host in hosts:
        del host["first_steps"]
    return found | {"hosts": hosts}


def by_ray_tune(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the baseline as users write it: a function that trains one trial, and a process for each."""
    import ray
    from ray import tune

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    started = time.monotonic()
    found: dict[str, Any] = {"losses": [None] * spec["num_trials"]}

    class Clock(tune.Callback):  # type: ignore[misc]
        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            if result.get("eval_loss") is not None:
                found["losses"][result["config"]["number"]] = result["eval_loss"]
                found.setdefault("first_report_s", since(started))
                found["makespan_s"] = since(started)

    tune.Tuner(
        tune.with_resources(train_alone, {"cpu": spec["cpus_per_trial"]}),
        param_space={"number": tune.grid_search(list(range(spec["num_trials"]))), "folder": spec["folder"]},
        run_config=tune.RunConfig(storage_path=f"{spec['folder']}/tune", callbacks=[Clock()], verbose=0),
    ).fit()
    return found


def train_alone(config: dict[str, Any]) -> None:
    """Train one trial in its own process."""
    import peft
    import torch
    import transformers
    from ray import tune

    folder = Path(config["folder"])
    spec, items = json.loads((folder / "trials.json").read_text()), torch.load(folder / "batches.pt")
    trial = spec["trials"][config["number"]]
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32
    )
    torch.manual_seed(trial["seed"])
    method = trial["method"]
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=method["rank"], lora_alpha=method["alpha"], target_modules="all-linear"
    )
    model = peft.get_peft_model(model, lora)
    arguments = transformers.TrainingArguments(
        output_dir=f"{folder}/out-{config['number']}", per_device_train_batch_size=1, per_device_eval_batch_size=1,
        num_train_epochs=1, learning_rate=trial["optim"]["learning_rate"], weight_decay=0.0, max_grad_norm=1.0,
        lr_scheduler_type="constant", optim="adamw_torch", save_strategy="no", report_to=[], disable_tqdm=True,
        train_sampling_strategy="sequential", use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(), remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=items["train"], eval_dataset=items["validation"],
        data_collator=lambda one: one[0],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    model.save_pretrained(f"{folder}/adapter-{config['number']}")
    tune.report({"eval_loss": loss})


def side(name: str, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a side in a fresh driver."""
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, __file__, "--side", name, "--folder", str(folder)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    with MemoryOfWorkers(driver.pid) as memory:
        code = driver.wait()
    if code:
        raise SystemExit(f"{name} failed with exit code {code}")
    found = json.loads((folder / f"{name}.json").read_text())
    at_peak = {process: round(held / 2**20) for process, held in memory.at_peak.items()}
    return found | {"peak_mb": round(memory.peak_bytes / 2**20), "peak_mb_by_process": at_peak}


def round_of(workload: Workload, folder: Path) -> dict[str, Any]:
    """Run both sides once."""
    folder.mkdir()
    study = study_of(workload, folder / "output")
    prepare(study, folder)
    ours = side("study", {"study": dump(study)}, folder)
    spec = {"folder": str(folder), "num_trials": workload.num_trials, "cpus_per_trial": 1}
    theirs = side("tune", spec, folder)
    apart = max(abs(a - b) / b for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    print({"study": ours["makespan_s"], "ray_tune": theirs["makespan_s"], "apart": apart}, flush=True)
    return {
        "study": ours,
        "ray_tune": theirs,
        "makespan_ratio": round(theirs["makespan_s"] / ours["makespan_s"], 2),
        "memory_ratio": round(theirs["peak_mb"] / ours["peak_mb"], 2),
        "largest_relative_loss_difference": float(f"{apart:.2g}"),
    }


def all_at_once(workload: Workload, folder: Path) -> dict[str, Any]:
    """Return the memory of the baseline's trials if all run at once, as the study's do."""
    folder.mkdir()
    short = replace(workload, steps=MEMORY_STEPS)
    prepare(study_of(short, folder / "output"), folder)
    cpus = (os.cpu_count() or 1) / workload.num_trials
    return side("tune", {"folder": str(folder), "num_trials": workload.num_trials, "cpus_per_trial": cpus}, folder)


def render(figures: dict[str, Any]) -> str:
    """Return the note to the figures, as Markdown."""
    lines = [
        "# A study against Ray Tune with one process a trial",
        "",
        f"{figures['date']}, {figures['machine']}.",
        "",
        (__doc__ or "").partition("\n\n")[2].strip(),
        "",
    ]
    for name, found in figures["workloads"].items():
        options, first = found["workload"], found["rounds"][0]
        lines += [
            f"## {name}: {options['num_trials']} trials of {options['steps']} steps, batch {options['batch_size']}",
            "",
            "| | study | Ray Tune, a process a trial | ratio |",
            "|---|---|---|---|",
            f"| makespan, s (median of {len(found['rounds'])}) | {found['makespan_s']['study']} "
            f"| {found['makespan_s']['ray_tune']} | **{found['makespan_ratio']}x** |",
            f"| first result after, s | {first['study']['first_report_s']} | {first['ray_tune']['first_report_s']} | |",
            f"| peak memory, MB (a core a trial) | {first['study']['peak_mb']} | {first['ray_tune']['peak_mb']} "
            f"| {first['memory_ratio']}x |",
        ]
        if "all_at_once" in found:
            lines.append(
                f"| peak memory, MB (all {options['num_trials']} trials at once) | {first['study']['peak_mb']} "
                f"| {found['all_at_once']['peak_mb']} | **{found['memory_ratio_all_at_once']}x** |"
            )
        apart = max(each["largest_relative_loss_difference"] for each in found["rounds"])
        lines += [
            "",
            f"Largest difference between the two sides' final validation losses: {apart:.2g}, relative. "
            f"Memory of the study's processes at its peak, MB: {first['study']['peak_mb_by_process']}.",
            *([found["note"]] if "note" in found else []),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(WORKLOADS), default="tiny")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="optimiser steps of a trial (default: the workload's)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"{today()}-search-speed", help="file to write, without .json and .md"
    )
    parser.add_argument("--note", help="remark for the results, such as the machine's other load")
    parser.add_argument("--side", choices=["study", "tune"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        spec = json.loads((options.folder / "spec.json").read_text())
        found = (by_study if options.side == "study" else by_ray_tune)(spec)
        (options.folder / f"{options.side}.json").write_text(json.dumps(found))
        return
    workload = WORKLOADS[options.workload]
    workload = replace(workload, steps=options.steps or workload.steps)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = tiny_llama(root / "model") if workload.model == "tiny" else workload.model
        workload = replace(workload, model=model)
        rounds = [round_of(workload, root / f"round-{i}") for i in range(options.rounds)]
        together = all_at_once(workload, root / "together") if options.workload != "tiny" else None
    makespan = {name: statistics.median(each[name]["makespan_s"] for each in rounds) for name in ("study", "ray_tune")}
    found = {
        "command": " ".join(["python", "benchmarks/search_speed.py", *sys.argv[1:]]),
        "workload": asdict(replace(workload, model=options.workload)),
        "makespan_s": makespan,
        "makespan_ratio": round(makespan["ray_tune"] / makespan["study"], 2),
        "rounds": rounds,
    }
    if options.note:
        found["note"] = options.note
    if together is not None:
        ratio = round(together["peak_mb"] / rounds[0]["study"]["peak_mb"], 2)
        found |= {"all_at_once": together, "memory_ratio_all_at_once": ratio}
    path = options.out.with_suffix(".json")
    before = json.loads(path.read_text()) if path.is_file() else {"workloads": {}}
    figures = {"date": today(), "machine": machine(), "workloads": before["workloads"] | {options.workload: found}}
    write_json(path, figures)
    options.out.with_suffix(".md").write_text(render(figures))
    print(render(figures))


if __name__ == "__main__":
    main()
