"""What a comparison's studies leave, made by hand: a journal, scorecards, and the results on each test row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rankloom.comparison.analysis import build_result
from rankloom.comparison.results import CompareResult
from rankloom.comparison.studies import build_seeds_study
from rankloom.config import CompareConfig, parse
from rankloom.evals.score import RowScore
from rankloom.events import TrialEnded, TrialEvaluated, TrialStarted
from rankloom.registry.scorecard import Extraction, Measures, MethodCost, Proportion, Scorecard
from rankloom.search.finalists import get_base_rows_file, get_rows_file
from rankloom.search.leaderboard import Leaderboard
from rankloom.search.priors import PriorCounts
from rankloom.search.results import ScoredTrial, StudyResult, ValidationScore
from rankloom.search.score_finalists import write_rows

NUM_ROWS = 60
LABELS = ["card", "fee", "transfer"]


@dataclass
class Left:
    """A comparison and what its studies left."""

    comparison: CompareConfig
    trained: StudyResult
    leaderboard: Leaderboard
    costs: dict[str, MethodCost]

    def result(self, tuning: Leaderboard | None = None) -> CompareResult:
        return build_result(self.comparison, self.trained, self.leaderboard, tuning, self.costs)


def outcomes(share: float, seed: int) -> list[RowScore]:
    """Rows of which a share is right, the same ones for each method as far as possible."""
    rng = np.random.default_rng(seed)
    hardness = (np.arange(NUM_ROWS) * 37 % NUM_ROWS) / NUM_ROWS
    found = []
    for number, hard in enumerate(hardness):
        right = hard + rng.normal(0, 0.03) < share
        label = LABELS[number % 3]
        found.append(RowScore(0.1 if right else 2.0, 1.0, label, label if right else LABELS[(number + 1) % 3]))
    return found


def measures_of(rows: list[RowScore]) -> Measures:
    share = float(np.mean([row.reference == row.prediction for row in rows]))
    proportion = Proportion(value=share, low=share, high=share)
    loss = float(np.mean([row.loss for row in rows]))
    return Measures(
        num_rows=len(rows), loss=loss, perplexity=2.0, accuracy=proportion, macro_f1=share, retention_loss=3.0,
        latency_ms=5.0,
    )  # fmt: skip


def cost_of(peak_mb: float) -> MethodCost:
    return MethodCost(
        trainable_parameters=1000, weight_bytes=10, gradient_bytes=2, optimizer_bytes=4, activation_bytes=8,
        peak_bytes=int(peak_mb * 1e6), tokens_per_s=1000 / peak_mb, num_steps=4, device="cpu x 2",
    )  # fmt: skip


@pytest.fixture
def left(tmp_path: Path) -> Callable[..., Left]:
    """Return a function that makes what the studies of lora, dora and full leave, given each one's share of right rows.

    A share of None: that trial failed. `shares` maps a method to its shares, one for each seed.
    """

    def make(shares: Mapping[str, list[float | None]], **settings: object) -> Left:
        num_seeds = len(next(iter(shares.values())))
        tree = {
            "name": "cmp",
            "trial": {"output": {"root": str(tmp_path)}},
            "methods": [name if name != "r4" else {"recipe": "lora", "name": "r4"} for name in shares],
            "seeds": list(range(num_seeds)),
        }
        comparison = parse(CompareConfig, tree | settings)
        study = build_seeds_study(comparison, {m.label: m.learning_rate for m in comparison.methods})
        folder, board, finalists = tmp_path / "comparisons" / "cmp" / "studies" / "cmp", Leaderboard(study), []
        folder.mkdir(parents=True)
        wanted = [share for each in shares.values() for share in each]
        base_rows = outcomes(0.3, 99)
        for number, share in enumerate(wanted):
            trial = f"t{number}"
            board.add(TrialStarted(trial=trial, point={"warm_start": number, "number": number, "refused": 0}))
            state = board.trials[trial]
            if share is None:
                board.add(TrialEnded(trial=trial, status="failed", error="the loss is not finite"))
                continue
            rows = outcomes(share, number)
            report = {"n": 1, "step": 8, "percent": 100.0, "train_loss": 1.0, "tokens": 800, "train_s": 2.0}
            board.add(TrialEvaluated(trial=trial, loss=1 - share, **report))  # type: ignore[arg-type]
            board.add(TrialEnded(trial=trial, status="done"))
            write_rows(get_rows_file(folder, trial), rows)
            write_rows(get_base_rows_file(folder, state.config), base_rows)
            adapter = folder / "adapters" / trial
            adapter.mkdir(parents=True)
            dora = state.config.method.type == "dora"
            (adapter / "adapter_config.json").write_text(json.dumps({"use_dora": dora}))
            save_file({"base_model.model.q.lora_A.weight": np.zeros((1, 2))}, adapter / "adapter_model.safetensors")
            measures = measures_of(rows)
            is_full = state.config.method.type == "full"
            scorecard = Scorecard(
                result=measures, base=measures_of(base_rows),
                extraction=Extraction(rank=64, energy=0.9, trained=measures_of(outcomes(share + 0.05, number)))
                if is_full else None,
                trainable_parameters=1000, adapter_bytes=2_000_000, peak_memory_bytes=1, steps=8, train_tokens=800,
                train_s=2.0, tokens_per_s=400.0, device="cpu",
            )  # fmt: skip
            finalists.append(
                ScoredTrial(
                    trial=trial, number=number, name=state.config.name, method=state.method, point=state.point,
                    validation=ValidationScore(loss=1 - share, accuracy=None, step=8), costs={}, on_front=False,
                    scorecard=scorecard, published=(f"cmp-{state.method}@1",) if number % num_seeds == 0 else (),
                    error=None,
                )
            )  # fmt: skip
        trained = StudyResult(
            status="done", name="cmp", folder=str(folder), results="", counts={}, num_refused=0, tokens=1,
            priors=PriorCounts(0, {}), hosts=(), finalists=tuple(finalists), registry=str(tmp_path / "registry"),
        )  # fmt: skip
        costs = {name: cost_of(10.0 * (1 + place)) for place, name in enumerate(shares)}
        return Left(comparison, trained, board, costs)

    return make
