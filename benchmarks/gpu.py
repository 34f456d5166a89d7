"""Training and serving on one GPU beside what users have without rankloom, with the goals that an H100 should reach.

    python benchmarks/gpu.py --out DIR [--dry] [SECTION ...]

It needs no network: weights are random, of the shapes of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B (SmolLM2 itself is
trained where its package is installed). It ends within eight minutes by its own clock: each section has a share of them
and stops with what it has. Every row is printed and appended to DIR/results.jsonl at once; a later run with this DIR
continues with the sections that have not finished. At the end the goals stand beside what was measured, also in
DIR/table.md; a miss has its profile in DIR. `--dry` runs everything at toy sizes on a CPU, where no figure counts.

Training baselines: PEFT in bf16 with fused AdamW, one trial after the other; eight such processes at once, plainly and
under MPS; one trial in a CUDA graph; the bare base. Serving baselines: the base alone, one adapter for all rows,
transformers' generate, and the time to read the weights once. Figures are medians, of real tokens without padding.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gpu_serving
import gpu_training
import torch
import transformers
from common import machine, today
from gpu_bench import Bench

from rankloom import kernels

LIMIT_S = 470.0


class Section(NamedTuple):
    run: Callable[[Bench], None]
    share_s: float
    """The most seconds that it may take, but for the measurement that has begun."""


SECTIONS = {
    "floors": Section(gpu_training.floors, 4),
    "bare": Section(gpu_training.bare, 12),
    "share": Section(gpu_training.share_of_bare, 22),
    "train-135M": Section(gpu_training.train_135m, 50),
    "train-1B": Section(gpu_training.train_1b, 45),
    "train-8B": Section(gpu_training.train_8b, 35),
    "serve-135M": Section(gpu_serving.serve_135m, 25),
    "serve-1B": Section(gpu_serving.serve_1b, 22),
    "serve-8B": Section(gpu_serving.serve_8b, 28),
    "study": Section(gpu_training.study, 25),
    "processes": Section(gpu_training.processes, 60),
    "one-in-a-graph": Section(gpu_training.one_in_a_graph, 15),
    "losses": Section(gpu_training.losses, 30),
}


def run_section(bench: Bench, name: str) -> None:
    """Run a section to its end, or tell why it failed; the next ones run all the same."""
    section = SECTIONS[name]
    if not bench.begin(name, section.share_s):
        return
    try:
        section.run(bench)
        bench.tell(done_s=round(section.share_s - bench.left_s, 1))
    except Exception as error:  # whatever failed, the other sections have their figures
        bench.tell(failed=f"{type(error).__name__}: {error}"[:500], where=traceback.format_exc()[-1000:])
    bench.reset_memory()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"one of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--dry", action="store_true", help="toy sizes on a CPU, by the same code")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --dry runs at toy sizes on a CPU")
    transformers.logging.set_verbosity_error()
    bench = Bench(options.out, dry=options.dry, limit_s=LIMIT_S)
    num_before = len(bench.rows)
    bench.section = "start"
    bench.tell(date=today(), machine=machine(), torch=torch.__version__, fast=kernels.use_on(bench.device))
    for name in options.sections or SECTIONS:
        run_section(bench, name)
    table = f"{today()}, {'a dry run on ' if options.dry else ''}{machine()}.\n\n{bench.table()}\n"
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    return 1 if any("failed" in row for row in bench.rows[num_before:]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
