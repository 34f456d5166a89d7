"""The loop against itself: resumed = uninterrupted, micro-batches = one batch, checkpointed activations = kept ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rankloom.config import TrialConfig, parse
from rankloom.data import load_data
from rankloom.errors import TrialError
from rankloom.events import Evaluated, Event, RunResumed, StepFinished
from rankloom.models import load_base, load_tokenizer
from rankloom.training.loop import TrainingLoop
from rankloom.training.session import LocalSession

CPU = torch.device("cpu")
METHODS: list[dict[str, Any]] = [
    {"type": "full"},
    {"type": "lora", "rank": 4, "dropout": 0.1},
    {"type": "dora", "rank": 4},
    {"type": "adalora", "initial_rank": 6, "target_rank": 3, "interval": 1},
    {"type": "galore", "rank": 8, "interval": 3},
    {"type": "galore", "rank": 8, "interval": 3, "optimizer": "adamw8bit"},
    {"type": "lisa", "num_layers": 1, "interval": 2},
]


def trial_of(model: Path, method: dict[str, Any], *, steps: int = 8, **sections: Any) -> TrialConfig:
    tree: dict[str, Any] = {
        "name": "parity",
        "model": {"id": str(model)},
        "data": {"max_train_rows": 64},
        "method": method,
        "optim": {"learning_rate": 2e-3, "batch_size": 8},
        "budget": {"steps": steps},
        "eval": {"every": 3, "max_rows": 16},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return parse(TrialConfig, tree)


def loop_of(trial: TrialConfig, run: Path) -> tuple[TrainingLoop, list[Event]]:
    events: list[Event] = []
    data = load_data(trial.data, load_tokenizer(trial.model))
    base = load_base(trial.model, trial.quantization, device=CPU)
    return TrainingLoop(trial, base, data, LocalSession(run, device=CPU, on_event=events.append)), events


def weights(loop: TrainingLoop) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in loop.method.get_trained(loop.module).items()}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(str(v) for v in m.values() if isinstance(v, str)))
def test_resumed_equals_uninterrupted_bit_for_bit(method: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    trial = trial_of(tiny_llama, method)
    whole, _ = loop_of(trial, tmp_path / "whole")
    for _ in range(8):
        whole.step()

    first, _ = loop_of(trial, tmp_path / "parts")
    for _ in range(5):
        first.step()
    first.save(0.0)
    second, events = loop_of(trial, tmp_path / "parts")
    assert RunResumed(step=5) in events
    for _ in range(3):
        second.step()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_micro_batches_do_not_change_the_result(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    results = []
    for accumulation in (1, 3):
        trial = trial_of(tiny_llama, {"type": kind}, optim={"accumulation": accumulation, "eps": 1e-4})
        loop, events = loop_of(trial, tmp_path / str(accumulation))
        for _ in range(6):
            loop.step()
        results.append((weights(loop), [e.loss for e in events if isinstance(e, StepFinished)]))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, atol=1e-5, rtol=1e-4)


def test_activation_checkpointing_does_not_change_the_result(tiny_llama: Path, tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        trial = trial_of(tiny_llama, {"type": "lora"}, compute={"activation_checkpointing": checkpointing})
        loop, events = loop_of(trial, tmp_path / str(checkpointing))
        for _ in range(4):
            loop.step()
        losses.append([e.loss for e in events if isinstance(e, StepFinished)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_learns_too(precision: str, tiny_llama: Path, tmp_path: Path) -> None:
    trial = trial_of(tiny_llama, {"type": "lora"}, steps=20)
    data = load_data(trial.data, load_tokenizer(trial.model))
    base = load_base(trial.model, trial.quantization, device=CPU)
    events: list[Event] = []
    session = LocalSession(tmp_path, device=CPU, on_event=events.append)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    loop = TrainingLoop(trial, base, data, session, dtype)
    for _ in range(20):
        loop.step()
    losses = [e.loss for e in events if isinstance(e, StepFinished)]
    assert losses[-1] < losses[0]
    assert loop.scaler.is_enabled() == (precision == "fp16")


def test_the_run_keeps_the_best_and_the_latest_checkpoint_and_ends_on_the_best(
    tiny_llama: Path, tmp_path: Path
) -> None:
    # a rate far too high for the end of the run: the best evaluation comes early
    trial = trial_of(tiny_llama, {"type": "lora"}, steps=30, optim={"learning_rate": 0.1, "schedule": "constant"})
    loop, events = loop_of(trial, tmp_path)
    assert loop.run()
    scored = {e.step: e.loss for e in events if isinstance(e, Evaluated) and e.step > 0}
    best = min(scored, key=lambda step: (scored[step], step))
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == sorted({best, 30})
    loss = loop.evaluate()
    assert -loss == pytest.approx(scored[best], rel=1e-5)


def test_early_stopping_waits_for_its_patience(tiny_llama: Path, tmp_path: Path) -> None:
    trial = trial_of(
        tiny_llama, {"type": "lora"}, steps=60,
        optim={"learning_rate": 0.3, "schedule": "constant"}, eval={"patience": 2, "every": 2},
    )  # fmt: skip
    loop, events = loop_of(trial, tmp_path)
    loop.run()
    evals = [e for e in events if isinstance(e, Evaluated) and e.step > 0]
    assert loop.progress.step < 60
    assert [e.best for e in evals[-2:]] == [False, False]
    assert evals[-3].best


def test_divergence_is_named_and_earlier_checkpoints_stay(tiny_llama: Path, tmp_path: Path) -> None:
    trial = trial_of(tiny_llama, {"type": "lora"}, steps=6)
    loop, _ = loop_of(trial, tmp_path)
    loop.step()
    loop.save(0.0)
    with torch.no_grad():
        next(p for p in loop.module.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(TrialError, match=r"diverged at step 2.*learning_rate"):
        loop.step()
    again, _ = loop_of(trial, tmp_path)
    assert again.progress.step == 1
    again.step()


def test_a_stop_leaves_a_checkpoint_to_go_on_from(tiny_llama: Path, tmp_path: Path) -> None:
    trial = trial_of(tiny_llama, {"type": "lora"}, steps=8)
    loop, events = loop_of(trial, tmp_path)

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepFinished) and event.step == 2:
            loop.session._stop.set()  # type: ignore[attr-defined]

    loop.session.emit = emit  # type: ignore[method-assign]
    assert loop.run() is False
    again, _ = loop_of(trial, tmp_path)
    assert again.progress.step == 2
    assert again.run() is True
    assert again.progress.step == 8
