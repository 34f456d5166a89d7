"""All ten recipes, each with its shipped config on SmolLM2-135M: does it lower the loss and publish a verified record?

    python benchmarks/methods.py [--root DIR] [--out benchmarks/results/DATE-methods] [key=value ...]

Runs `rankloom train` and `rankloom adapters verify` as a user would, one config after the other, and writes a table.
The budgets are small (see the configs): the table shows that each recipe works, not which one is best.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine, today, write_json

from rankloom.events import Evaluated, read_events

CONFIGS = ["full", "lora", "qlora", "dora", "qdora", "lora-plus", "qlora-lora-plus", "adalora", "galore", "lisa"]
COLUMNS = (
    "recipe | steps | validation loss, start | end | test accuracy | base | trainable | adapter MB | peak MB | train s"
)


def rankloom(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "rankloom.cli", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(config: str, root: Path, overrides: list[str]) -> dict[str, Any]:
    """Train one config, verify its record, and return its figures."""
    result = rankloom("train", f"shipped:trials/{config}.yaml", f"output.root={root}", *overrides)
    rankloom("adapters", "verify", f"{result['name']}@{result['version']}", "--registry", f"{root}/registry")
    events = read_events(Path(result["run"]) / "events.jsonl")
    losses = [event.loss for event in events if isinstance(event, Evaluated)]
    assert losses[-1] < losses[0], f"{config}: the validation loss rose from {losses[0]} to {losses[-1]}"
    return {"recipe": config, "first_loss": losses[0], "last_loss": losses[-1], "scorecard": result["scorecard"]}


def row(figures: dict[str, Any]) -> str:
    card = figures["scorecard"]
    accuracy, base = card["result"]["accuracy"], card["base"]["accuracy"]
    cells = [
        figures["recipe"],
        card["steps"],
        f"{figures['first_loss']:.2f}",
        f"{figures['last_loss']:.2f}",
        f"{accuracy['value']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}]",
        f"{base['value']:.1%}",
        f"{card['trainable_parameters'] / 1e6:.2f} M",
        f"{card['adapter_bytes'] / 1e6:.0f}",
        f"{card['peak_memory_bytes'] / 1e6:.0f}",
        f"{card['train_s']:.0f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="keep runs and registry here (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = (options.root or Path(scratch)).resolve()
        table = [f"| {COLUMNS} |", "|" + "---|" * (COLUMNS.count("|") + 1)]
        print(*table, sep="\n")
        found = []
        for config in CONFIGS:
            found.append(measure(config, root, options.overrides))
            table.append(row(found[-1]))
            print(table[-1], flush=True)
    if options.out:
        command = " ".join(["python benchmarks/methods.py", *options.overrides])
        text = (__doc__ or "").split("\n\n")[-1]
        head = f"{today()}, {machine()}, {found[0]['scorecard']['device']} threads. Command: `{command}`\n\n{text}"
        options.out.with_suffix(".md").write_text("# All ten recipes\n\n" + head + "\n" + "\n".join(table) + "\n")
        write_json(options.out.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
