"""Start-up time of a study: from the command to the first trial's first step, and the start of each later trial.

    python benchmarks/startup.py [--model tiny|builtin:smollm2] [--out benchmarks/results/DATE-startup]

A driver starts as a command does. Its phases: importing the study's path; starting a local Ray and requesting the host;
in the host's process importing torch, then reading the data and loading the base; the rest is the process's start, the
wait for the first trials, and the first step. The start of a later trial lasts from the driver's event that it begins
to the beginning, and to the end, of its first step; no trials wait, so none is prepared before a slot is free.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, machine, markdown_table, tiny_llama, today, write_json

SLOTS, TRIALS = 4, 12
HEADER = [
    "model", "command to first step, s", "to its end", "imports", "Ray", "torch, in the host", "data and base",
    "the rest", "later trials to first step, s: median", "most", "to its end: median", "most",
]  # fmt: skip


def study_of(model: str, root: Path) -> dict[str, Any]:
    steps = 40 if model != "builtin:smollm2" else 4
    return {
        "name": "startup",
        "trial": {
            "model": {"id": model},
            "data": {"template": "plain"},
            "optim": {"batch_size": 1},
            "budget": {"steps": steps},
            "eval": {"every": steps, "max_rows": 2, "max_test_rows": 2, "base": False, "latency": False},
            "output": {"root": str(root)},
        },
        "space": [{"method": {"type": "lora", "rank": 8}, "optim": {"learning_rate": {"loguniform": [1e-4, 1e-3]}}}],
        "search": {"num_trials": TRIALS},
        "scheduler": {"type": "fifo"},
        "hosts": {"num_slots": SLOTS, "num_waiting": 0},
        "final": {"top_k": 1, "publish": False},
    }


def drive(study: dict[str, Any]) -> dict[str, Any]:
    """Run the driver; return the clock time of each event."""
    from rankloom.config import StudyConfig, parse
    from rankloom.events import Event, PhaseStarted, TrialStarted
    from rankloom.search.study import tune

    parsed = parse(StudyConfig, study)
    times: dict[str, Any] = {"phases": [], "trials": {}}

    def take(event: Event) -> None:
        match event:
            case PhaseStarted():
                times["phases"].append(time.time())
            case TrialStarted(trial=trial):
                times["trials"][trial] = time.time()

    [host] = tune(parsed, on_event=take).hosts
    return times | {"first_steps": host.first_steps, "load_s": host.load_s, "import_s": host.import_s}


def row_of(model: str, found: dict[str, Any]) -> list[Any]:
    """Return a model's row of the table."""
    began, done = found["later_trials_s"]["until_the_step"], found["later_trials_s"]["step_done"]
    names = ("to_first_step_s", "importing_s", "ray_s", "torch_s", "loading_s", "host_process_and_first_step_s")
    first = [model, f"**{found['until_the_step_s']}**", *(found[name] for name in names)]
    return [*first, f"**{began['median']}**", began["most"], done["median"], done["most"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"{today()}-startup", help="file to write, without .json and .md"
    )
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        found = drive(json.loads((options.drive / "study.json").read_text()))
        (options.drive / "found.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = tiny_llama(folder / "model") if options.model == "tiny" else options.model
        write_json(folder / "study.json", study_of(model, folder / "output"))
        command = time.time()
        subprocess.run([sys.executable, __file__, "--drive", scratch], check=True, stdout=subprocess.DEVNULL)
        times = json.loads((folder / "found.json").read_text())
    imported, opened = times["phases"][:2]
    began, ended = ({trial: both[i] for trial, both in times["first_steps"].items()} for i in (0, 1))
    first = min(ended.values())
    last = sorted(times["trials"], key=lambda trial: times["trials"][trial])[SLOTS:]
    later = {
        name: [clock[trial] - times["trials"][trial] for trial in last]
        for name, clock in (("until_the_step", began), ("step_done", ended))
    }
    found = {
        "command": " ".join(["python", "benchmarks/startup.py", *sys.argv[1:]]),
        "to_first_step_s": round(first - command, 2),
        "until_the_step_s": round(min(began.values()) - command, 2),
        "importing_s": round(imported - command, 2),
        "ray_s": round(opened - imported, 2),
        "torch_s": round(times["import_s"], 2),
        "loading_s": round(times["load_s"] - times["import_s"], 2),
        "host_process_and_first_step_s": round(first - opened - times["load_s"], 2),
        "later_trials_s": {
            name: {"median": round(statistics.median(each), 3), "most": round(max(each), 3)}
            for name, each in later.items()
        },
    }
    path = options.out.with_suffix(".json")
    before = json.loads(path.read_text())["models"] if path.is_file() else {}
    figures = {"date": today(), "machine": machine(), "models": before | {options.model: found}}
    write_json(path, figures)
    lines = ["# How long until a study trains", "", f"{figures['date']}, {figures['machine']}.", ""]
    lines += [(__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip(), ""]
    lines += [markdown_table(HEADER, [row_of(name, each) for name, each in figures["models"].items()])]
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
