"""Comparisons on a real local Ray: stopped or killed amid their training, resumed, and ended with a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import rankloom as rl
from rankloom.cli import main
from rankloom.events import Event, TrialEnded

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SOURCE = str(Path(__file__).resolve().parents[2] / "platform")


def share_settings(trial: dict[str, Any]) -> dict[str, Any]:
    """What all methods of a comparison share of a trial's settings."""
    return {key: trial[key] for key in ("model", "data", "optim", "budget", "eval", "compute", "output")}


@pytest.mark.usefixtures("local_ray")
def test_a_comparison_is_resumed_and_says_what_each_method_does_and_costs(
    tiny_trial: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    trial = tiny_trial(budget={"steps": 8}, compute={"device": "cpu", "cpus_per_worker": 1})
    trial["eval"] |= {"retention": "builtin:general-facts"}
    small = {"recipe": "lora", "method": {"rank": 4}}  # rank 16 trains a third as much as all of so small a model
    comparison = rl.CompareConfig(
        name="cmp", trial=share_settings(trial), methods=[small, "dora", "full"], seeds=[0, 1]
    )
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


def test_a_killed_comparison_keeps_its_learning_rates_and_what_has_ended(
    tiny_trial: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    trial = tiny_trial(budget={"steps": 60}, compute={"device": "cpu", "cpus_per_worker": 1})
    comparison = {
        "name": "cmp", "trial": share_settings(trial), "methods": ["lora", "dora"], "seeds": [0, 1, 2], "tune": 2,
        "hosts": {"num_slots": 1, "num_waiting": 0},
    }  # fmt: skip
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(comparison))
    command = [sys.executable, "-m", "rankloom.cli", "compare", str(tmp_path / "compare.yaml")]
    environment = os.environ | {"PYTHONPATH": SOURCE}
    studies = tmp_path / "out" / "comparisons" / "cmp" / "studies"
    journal, log = studies / "cmp" / "journal.jsonl", tmp_path / "log"
    with log.open("w") as opened:
        driver = subprocess.Popen(command, env=environment, stdout=opened, stderr=opened, start_new_session=True)
        deadline = time.monotonic() + 300
        while not journal.is_file() or '"event": "end"' not in journal.read_text():
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        lines = journal.read_text().splitlines()
        ended = [json.loads(line)["trial"] for line in lines if '"event": "end"' in line]
        time.sleep(4)  # Ray Tune's state is saved every three seconds; a trial that ends later may be repeated
        driver.kill()
        driver.wait()
    before, rates = journal.read_text(), (studies / "cmp-rates" / "journal.jsonl").read_text()
    assert 0 < before.count('"event": "end"') < 6

    resume = [*command, "--resume", "--json"]
    done = subprocess.run(resume, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [(method["seeds"], method["num_trials"]) for method in result["methods"]] == [([0, 1, 2], 5)] * 2
    assert {method["learning_rate"] for method in result["methods"]} <= {0.000562, 0.00178}
    assert all("is the lowest tried" in note or "is the highest tried" in note for note in result["notes"])
    assert len(result["notes"]) == 2  # of two rates each is an end
    assert (studies / "cmp-rates" / "journal.jsonl").read_text() == rates
    later = journal.read_text()[len(before) :]
    assert not [trial for trial in ended if f'"trial": "{trial}"' in later]
