"""A comparison on a real local Ray: stopped amid its training, resumed, and ended with a table of three methods."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rankloom as rl
from rankloom.cli import main
from rankloom.events import Event, TrialEnded

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def test_a_comparison_is_resumed_and_says_what_each_method_does_and_costs(
    tiny_trial: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    trial = tiny_trial(budget={"steps": 8}, compute={"device": "cpu", "cpus_per_worker": 1})
    trial["eval"] |= {"retention": "builtin:general-facts"}
    shared = {key: trial[key] for key in ("model", "data", "optim", "budget", "eval", "compute", "output")}
    comparison = rl.CompareConfig(name="cmp", trial=shared, methods=["lora", "dora", "full"], seeds=[0, 1])
    stop, ended = threading.Event(), list[TrialEnded]()

    def note(event: Event) -> None:
        if isinstance(event, TrialEnded):
            ended.append(event)

    def stop_at_the_first(event: Event) -> None:
        note(event)
        if ended:
            stop.set()

    stopped = rl.compare(comparison, on_event=stop_at_the_first, stop=stop)
    assert stopped.status == "interrupted"
    assert 0 < len(ended) < 6
    result = rl.compare(comparison, resume=True, on_event=note)
    assert result.status == "done"
    assert len(ended) == len({event.trial for event in ended}) == 6  # what had ended was not repeated

    lora, dora, full = sorted(result.methods, key=lambda method: ["lora", "dora", "full"].index(method.name))
    for method in (lora, dora, full):
        assert method.seeds == (0, 1)
        assert method.accuracy.low <= method.accuracy.value <= method.accuracy.high
        assert method.retention_loss > 0
        assert method.cost.tokens_per_s > 0
        assert method.adapter == f"cmp-{method.name}@1"
    assert lora.tokens == dora.tokens == full.tokens  # one budget for all
    assert full.cost.trainable_parameters > 5 * lora.cost.trainable_parameters
    assert full.cost.optimizer_bytes > 5 * lora.cost.optimizer_bytes
    assert full.energy > 0
    assert full.before_extraction is not None
    assert len(result.tests) == 3
    folder = Path(result.folder)
    names = {"report.html", "result.json", "table.csv", "table.md", "table.parquet", "tests.csv"}
    assert names <= {file.name for file in folder.iterdir()}
    assert rl.compare(comparison, resume=True) == result

    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["compare", str(folder / "compare.yaml"), "--resume", "--promote"])
    assert not exit_.value.code
    printed = capsys.readouterr().out
    assert result.verdict[0] in printed
    assert f"promoted {result.adapter}: champion of" in printed
    registry = rl.Registry(result.registry)
    assert registry.aliases(f"cmp-{result.leader.name}")["champion"] == 1
