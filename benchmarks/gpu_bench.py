"""What the sections of `gpu.py` share: the clock, the results on disk, measuring, and the goals."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from random_models import SHAPES, TINY

MOST_STEPS = 60
WARM_SHARE = 0.4
"""Share of a measurement's seconds that warms up: kernels are compiled, and graphs recorded, in the first steps."""


@dataclass(frozen=True)
class Goal:
    """A figure to reach on an H100."""

    what: str
    bound: float
    unit: str
    at_most: bool = False

    def is_met_by(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


GOALS = {
    "135M 1x64..256 K=16": Goal("fused against one PEFT trial after the other, 135M, 1 x 64..256, K = 16", 20, "x"),
    "135M 1x64..256 K=32": Goal("the same, K = 32", 35, "x"),
    "135M 4x64..256 K=16": Goal("135M, 4 x 64..256, K = 16", 20, "x"),
    "1B 1x64 K=16": Goal("1B, 1 x 64, K = 16", 12, "x"),
    "1B 4x64 K=16": Goal("1B, 4 x 64, K = 16", 4, "x"),
    "1B 4x512 K=16": Goal("1B, 4 x 512, K = 16", 1.2, "x"),
    "8B 1x64 K=16": Goal("8B, 1 x 64, K = 16", 6, "x"),
    "processes": Goal("fused against eight processes at once, 135M, 1 x 64..256", 4, "x"),
    "lora share": Goal("share of the bare base's tokens/s, 1B, 8k tokens, ranks 4 to 64, LoRA", 85, "%"),
    "dora share": Goal("the same, DoRA", 75, "%"),
    "bare 1B": Goal("the bare base itself, 1B", 110_000, " tokens/s"),
    "8B memory r=16": Goal("16 trials of an 8B, memory against one, rank 16", 1.3, "x", at_most=True),
    "8B memory r=4": Goal("the same, rank 4", 1.3, "x", at_most=True),
    "non-step": Goal("non-step share of a study's time, 135M, eval every 50", 20, "%", at_most=True),
    "decode 135M": Goal("decode step, 16 rows, 16 adapters, 135M", 3, " ms", at_most=True),
    "decode 1B": Goal("the same, 1B", 3.5, " ms", at_most=True),
    "decode 8B": Goal("the same, 8B", 11, " ms", at_most=True),
    "adapters 135M": Goal("16 distinct adapters against base only, 135M", 88, "%"),
    "adapters 1B": Goal("the same, 1B", 88, "%"),
    "adapters 8B": Goal("the same, 8B", 88, "%"),
}


@dataclass(frozen=True)
class Speed:
    """The median of measured steps."""

    tokens_per_s: float
    ms: float
    num_steps: int

    def row(self, name: str) -> dict[str, Any]:
        return {f"{name}_tokens_per_s": round(self.tokens_per_s), f"{name}_ms": round(self.ms, 2)}


@dataclass
class Bench:
    """A run of the benchmark: one results file, which a later run continues."""

    out: Path
    dry: bool
    limit_s: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    section: str = ""
    started: float = field(default_factory=time.monotonic)
    ends_at: float = 0.0
    """When the section's time is over."""

    def __post_init__(self) -> None:
        gc.freeze()  # else each collection between measurements would go through all that is imported
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "results.jsonl"
        self.device = torch.device("cpu" if self.dry else "cuda")
        if self.dry:
            torch.set_num_threads(1)
        if self.file.is_file():
            self.rows = [json.loads(line) for line in self.file.read_text().splitlines()]

    def begin(self, section: str, share_s: float) -> bool:
        """Begin a section with its share of the time; False where none is left or an earlier run has finished it."""
        left = self.limit_s - self.elapsed_s
        if any(row["section"] == section and "done_s" in row for row in self.rows) or left <= 0:
            return False
        self.section, self.ends_at = section, time.monotonic() + min(share_s, left)
        return True

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def left_s(self) -> float:
        """Seconds that the section has left."""
        return self.ends_at - time.monotonic()

    def tell(self, **row: Any) -> None:
        """Print a row and append it to the file at once."""
        row = {"section": self.section, **row, "at_s": round(self.elapsed_s, 1)}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def reach(self, goal: str, value: float, run: Callable[[], Any] | None = None, **row: Any) -> None:
        """Tell a goal's figure; where it is missed, write the profile of `run` beside the results."""
        self.tell(goal=goal, value=round(value, 2), **row)
        if run is not None and not self.dry and not GOALS[goal].is_met_by(value):
            self.write_profile(goal, run)

    def members(self, num: int) -> int:
        return min(num, 4) if self.dry else num

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """Return the last row with these values."""
        return next((row for row in reversed(self.rows) if wanted.items() <= row.items()), None)

    def shape(self, name: str) -> Mapping[str, int]:
        return TINY | {"num_hidden_layers": 2} if self.dry else SHAPES[name]

    def measure(self, run: Callable[[], int], seconds: float) -> Speed:
        """Call `run`, which returns the number of its tokens, again and again; the first calls do not count."""
        seconds = min(seconds, max(self.left_s, 0.0)) if not self.dry else 0.0
        began, speeds = time.perf_counter(), []
        run()
        self.wait()
        while time.perf_counter() - began < WARM_SHARE * seconds:
            run()
        self.wait()
        while not speeds or (time.perf_counter() - began < seconds and len(speeds) < MOST_STEPS):
            started = time.perf_counter()
            num_tokens = run()
            self.wait()
            took = time.perf_counter() - started
            speeds.append((num_tokens / took, 1e3 * took))
        rates, times = zip(*speeds, strict=True)
        return Speed(statistics.median(rates), statistics.median(times), len(speeds))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset_memory(self) -> None:
        """Free what is left of earlier work, and forget its peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """Return the most that was taken from the device, with what graphs and the allocator keep; 0 on a CPU."""
        return torch.cuda.max_memory_reserved() / 1e9 if self.device.type == "cuda" else 0.0

    def write_profile(self, name: str, run: Callable[[], Any]) -> None:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            run()
            self.wait()
        averages = found.key_averages()
        tables = [averages.table(sort_by=f"self_{kind}_time_total", row_limit=40) for kind in ("device", "cpu")]
        (self.out / f"profile-{name.replace(' ', '-')}.txt").write_text("\n\n".join(tables), encoding="utf-8")
        launches = sum("aunchKernel" in event.name for event in found.events())
        busy_us = sum(average.self_device_time_total for average in averages)
        self.tell(profile=name, launches=launches, device_ms=round(busy_us / 1e3, 2))

    def table(self) -> str:
        """Return the goals with what was measured."""
        lines = ["| what | goal | measured | met |", "|---|---|---|---|"]
        for key, goal in GOALS.items():
            bound = f"{'<=' if goal.at_most else '>='} {goal.bound:g}{goal.unit}"
            row = self.find(goal=key)
            measured = f"{row['value']:g}{goal.unit}" if row else "not measured"
            met = ("yes" if goal.is_met_by(row["value"]) else "**no**") if row and not self.dry else ""
            lines.append(f"| {goal.what} | {bound} | {measured} | {met} |")
        return "\n".join(lines)
