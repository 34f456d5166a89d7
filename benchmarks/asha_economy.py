"""Successive halving against complete trials: tokens, best result, and occupancy of the host's steps.

    python benchmarks/asha_economy.py [--trials 64] [--steps 200] [--out benchmarks/results/DATE-asha-economy]

Random search with one seed tries the points on the tiny model twice: with ASHA, and with every trial run to its end.
Tokens count all that the host trained on, also those ahead of the scheduler that were discarded. Occupancy is the mean
over the host's steps of the share of slots that trained. There are more trials than slots.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import RESULTS, machine, since, tiny_llama, today, write_json

from rankloom.config import StudyConfig, parse
from rankloom.events import Event, TrialEnded
from rankloom.search.study import tune

TOLERANCE = 0.02
"""ASHA's best counts as equally good if its validation loss is at most this share above the other's."""
EVALUATIONS = 20
"""Reports of a trial that runs to its end."""


def study_of(model: str, scheduler: dict[str, Any], root: Path, options: argparse.Namespace) -> StudyConfig:
    trial = {
        "model": {"id": model},
        "data": {"template": "plain"},
        "optim": {"batch_size": 4},
        "budget": {"steps": options.steps},
        "eval": {
            "every": options.steps // EVALUATIONS, "max_rows": 32, "max_test_rows": 16, "base": False, "latency": False
        },
        "output": {"root": str(root)},
    }  # fmt: skip
    knobs = {"rank": {"choice": [2, 4, 8]}, "alpha_over_rank": {"choice": [1, 2, 4]}}
    return parse(
        StudyConfig,
        {
            "name": f"economy-{scheduler['type']}",
            "trial": trial,
            "space": [
                {
                    "method": {"type": "lora"} | knobs,
                    "optim": {"learning_rate": {"loguniform": [1e-5, 3e-2]}, "loraplus_ratio": {"choice": [1, 4, 16]}},
                },
                {"method": {"type": "dora"} | knobs, "optim": {"learning_rate": {"loguniform": [1e-5, 3e-2]}}},
            ],
            "search": {"num_trials": options.trials},
            "scheduler": scheduler,
            "hosts": {"num_slots": options.slots},
            "final": {"top_k": 1, "publish": False},
        },
    )


def run_search(study: StudyConfig) -> dict[str, Any]:
    """Run a study, and return its best result and its cost."""
    import pyarrow.parquet as pq

    started, seconds = time.monotonic(), {}

    def take(event: Event) -> None:
        if isinstance(event, TrialEnded):
            seconds["search"] = since(started)

    result = tune(study, on_event=take)
    rows = pq.read_table(result.results).to_pylist()
    best = min((row for row in rows if row["best_loss"] is not None), key=lambda row: row["best_loss"])
    [report] = result.hosts
    host = asdict(report)
    del host["first_steps"]
    return {
        "best_loss": best["best_loss"],
        "best_number": best["number"],
        "counts": result.counts,
        "reported_tokens": result.tokens,
        "trained_tokens": host["tokens"],
        "occupancy": round(host["occupancy"], 3),
        "search_s": seconds["search"],
        "host": host,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", choices=["asha", "fifo"], help="run one side only, and write nothing")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"{today()}-asha-economy", help="file to write, without .json and .md"
    )
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_llama(Path(scratch) / "model")
        for name, scheduler in (("asha", {"type": "asha", "grace": 0.1}), ("fifo", {"type": "fifo"})):
            if options.only in (None, name):
                found[name] = run_search(study_of(model, scheduler, Path(scratch) / name, options))
                print(name, found[name], flush=True)
    if options.only:
        return
    asha, whole = found["asha"], found["fifo"]
    share = asha["trained_tokens"] / whole["trained_tokens"]
    above = asha["best_loss"] / whole["best_loss"] - 1
    figures = {
        "date": today(),
        "machine": machine(),
        "command": " ".join(["python", "benchmarks/asha_economy.py", *sys.argv[1:]]),
        "options": {name: getattr(options, name) for name in ("trials", "slots", "steps")},
        "share_of_tokens": round(share, 3),
        "best_loss_above": round(above, 4),
        "as_good": above <= TOLERANCE,
        "sides": found,
    }
    write_json(options.out.with_suffix(".json"), figures)
    lines = [
        "# ASHA against every trial run to its end",
        "",
        f"{figures['date']}, {figures['machine']}. Command: `{figures['command']}`",
        "",
        (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip(),
        "",
        f"| {options.trials} trials, {options.slots} slots | ASHA | to the end |",
        "|---|---|---|",
        f"| tokens trained on | {asha['trained_tokens']} (**{share:.1%}**) | {whole['trained_tokens']} |",
        f"| best validation loss | {asha['best_loss']:.4f} (**{above:+.2%}**) | {whole['best_loss']:.4f} |",
        f"| trial of the best | {asha['best_number']} | {whole['best_number']} |",
        f"| occupancy | **{asha['occupancy']:.1%}** | {whole['occupancy']:.1%} |",
        f"| search, s | {asha['search_s']} | {whole['search_s']} |",
        f"| of it training, evaluating, saving, s | {_split(asha)} | {_split(whole)} |",
        "",
        f"As good means: at most {TOLERANCE:.0%} above in validation loss.",
        "",
    ]
    options.out.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


def _split(side: dict[str, Any]) -> str:
    return ", ".join(f"{side['host'][part]:.1f}" for part in ("train_s", "eval_s", "save_s"))


if __name__ == "__main__":
    main()
