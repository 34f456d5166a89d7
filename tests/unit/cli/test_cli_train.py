"""`rankloom train` and `evaluate` for real, in this process: a tiny model, a few steps."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

import rankloom as rl
from rankloom.cli import main


@pytest.fixture
def trial_file(tmp_path: Path, tiny_llama: Path) -> Path:
    texts = {"card_lost": "my card was lost", "transfer": "transfer money to a friend"}
    rows = [f"{text} {i},{label}" for i in range(32) for label, text in texts.items()]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    settings = {
        "name": "tiny",
        "model": {"id": str(tiny_llama)},
        "data": {"train": str(tmp_path / "rows.csv"), "max_length": 64},
        "method": {"type": "lora", "rank": 2},
        "optim": {"batch_size": 4},
        "budget": {"steps": 6},
        "eval": {"every": 3, "latency": False, "max_rows": 8, "max_test_rows": 8},
        "compute": {"num_workers": 0, "device": "cpu"},
        "output": {"root": str(tmp_path / "out")},
    }
    file = tmp_path / "trial.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_train_then_evaluate(trial_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", str(trial_file), "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)  # the result alone
    assert "step 6/6" in captured.err
    assert (result["status"], result["steps"], result["version"]) == ("done", 6, 1)
    assert json.loads((Path(result["run"]) / "result.json").read_text()) == result

    assert run("train", str(trial_file)) == 2
    assert "--resume continues it" in capsys.readouterr().err

    assert run("train", str(trial_file), "--resume") == 0  # finished: told again, as a table
    text = capsys.readouterr().out
    assert "accuracy [95 %]" in text
    assert "rankloom adapters promote tiny@1" in text

    assert run("evaluate", "tiny", "--registry", result["registry"], "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["adapter"] == "tiny@1"
    assert scored["result"]["loss"] == pytest.approx(result["scorecard"]["result"]["loss"], rel=1e-4)
    assert scored["base"]["loss"] == pytest.approx(result["scorecard"]["base"]["loss"], rel=1e-4)

    rows = [{"text": "my card was lost", "label": "card_lost"}] * 3
    handed_over = rl.evaluate("tiny", data=rows, registry=result["registry"])
    assert handed_over.result is not None
    assert handed_over.result.accuracy is not None
    assert handed_over.result.accuracy.value in (0, 1)  # equal rows
    assert run("evaluate", str(trial_file), "eval.max_test_rows=4") == 0
    text = capsys.readouterr().out
    assert "perplexity" in text
    assert "adapter" not in text


def test_ctrl_c_keeps_a_checkpoint_and_resume_goes_on(trial_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events, before = trial_file.parent / "out" / "runs" / "tiny" / "events.jsonl", signal.getsignal(signal.SIGINT)

    def press_ctrl_c() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if events.is_file() and '"step": 2,' in events.read_text():
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.005)

    threading.Thread(target=press_ctrl_c).start()
    assert run("train", str(trial_file), "budget.steps=2000") == 130
    assert "--resume continues" in capsys.readouterr().out
    stopped = max(int(p.name) for p in (events.parent / "checkpoints").iterdir())
    assert 2 <= stopped < 2000

    assert run("train", str(trial_file), f"budget.steps={stopped + 2}", "--resume") == 0
    text = capsys.readouterr().out
    assert f"resumed at step {stopped}" in text
    assert f"step {stopped + 2}/{stopped + 2}" in text
    assert signal.getsignal(signal.SIGINT) is before


def test_errors_of_the_data_and_of_the_code(
    trial_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("train", str(trial_file), "data.train=missing.csv", "name=a") == 1
    text = capsys.readouterr().err
    assert "missing.csv" in text
    assert "Traceback" not in text
    assert run("train", str(trial_file), "name=a") == 0  # nothing was trained: the corrected trial may have the name
    capsys.readouterr()

    import rankloom.training.run

    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(rankloom.training.run, "load_data", broken)
    assert run("train", str(trial_file), "name=b") == 1
    text = capsys.readouterr().err
    log = trial_file.parent / "out" / "runs" / "b" / "error.log"
    assert text == f"error: failed: KeyError: 'a bug of ours'; the full trace is in {log}\n"
    assert "Traceback" in log.read_text()
