"""The command line's surface: light imports, exit codes, one-line errors, shipped configs, progress in words."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from rankloom.cli import main
from rankloom.cli.progress import PlainProgress, format_duration, format_event, format_step, interrupt_at_events
from rankloom.cli.tables import list_next_steps
from rankloom.config.files import find_config
from rankloom.errors import ConfigError
from rankloom.events import Evaluated, Event, PhaseStarted, RunResumed, StepFinished
from rankloom.launch.results import TrialResult
from rankloom.paths import find_shipped_folder


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command that is expected to fail."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "tune", "compare", "serve", "evaluate", "submit train", "doctor", "schema"])
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*verb.split(), "--help"])
    assert not caught.value.code
    assert "Example" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no-such.yaml"], "no-such.yaml: no such file"),
        (["train", "shipped:trials/lorra.yaml"], "did you mean shipped:trials/lora.yaml"),
        (["train", "shipped:trials/lora.yaml", "method.rnk=8"], "did you mean 'rank'?"),
        (["train", "shipped:trials/lora.yaml", "optim.batch_size=many"], "optim.batch_size"),
        (["train", "shipped:trials/full.yaml", "quantization=nf4"], "quantization=nf4"),
        (["train", "shipped:trials/lora.yaml", "--resume"], "no run 'bank-intents-lora'"),
        (["train", "shipped:trials/lora.yaml", "tracking.wandb_project=x"], "wandb"),
        (["schema", "nothing"], "allowed: trial"),
        (["submit", "train", "shipped:trials/lora.yaml", "--address", "head:8265"], "http://head:8265"),
        (["evaluate", "configs/no-such.yaml"], "no-such.yaml: no such file"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    code, text = fails(capsys, *arguments)
    assert code == 2
    assert text.startswith("error: ")
    assert message in text
    assert "Traceback" not in text


def test_unreachable_cluster_and_unknown_adapter_fail_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = fails(capsys, "submit", "train", "shipped:trials/lora.yaml", "--address", "http://127.0.0.1:9")
    assert (code, "nothing answers at http://127.0.0.1:9" in text) == (1, True)
    code, text = fails(capsys, "evaluate", "nobody")
    assert (code, "no adapter 'nobody'" in text) == (1, True)


def test_unknown_options_are_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = fails(capsys, "train", "shipped:trials/lora.yaml", "--ressume")
    assert code == 2
    assert "--resume" in text


def test_a_folder_without_a_record_is_not_guessed_at(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, text = fails(capsys, "evaluate", str(tmp_path))
    assert (code, "publish it first" in text) == (2, True)


def test_schema_is_what_the_config_accepts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["schema", "trial"])
    schema = json.loads(capsys.readouterr().out)
    assert {"name", "method", "optim"} <= set(schema["properties"])


def test_doctor_finds_what_tests_need_and_names_a_broken_registry(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--json"])
    checks = json.loads(capsys.readouterr().out)
    found = {check["name"]: check["status"] for check in checks}
    assert caught.value.code == 0
    assert {found[name] for name in ("python", "torch", "ray", "registry")} == {"ok"}
    told = {check["name"]: check["detail"] for check in checks}
    if not torch.cuda.is_available():
        assert told["engine"] == "engine.type=auto takes bank, as there is no GPU"
        assert told["training"] == "fp32; a host: up to 8 slots, 8,192 tokens a step"
        assert told["serving"] == (
            "fp32; 16 sequences, 512 tokens a step; KV cache 16,384 tokens, prefixes 8,192 tokens"
        )

    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--registry", str(tmp_path / "file")])
    assert caught.value.code == 1
    assert "can't be written" in capsys.readouterr().out


def test_doctor_tells_what_attention_is_computed_with(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> dict[str, tuple[str, str]]:
        with pytest.raises(SystemExit):
            main(["doctor", "--json"])
        return {check["name"]: (check["status"], check["detail"]) for check in json.loads(capsys.readouterr().out)}

    import torch

    first = told()
    if not torch.cuda.is_available():
        assert first["attention"] == ("ok", "torch has flash, math")
    assert first["triton"][0] == "ok"
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: None)  # has them all
    assert told()["attention"][1].startswith("torch has flash, memory-efficient, math, cuDNN; runs avoid cuDNN's")

    def has_none(*_: object, **__: object) -> None:
        raise RuntimeError("No available kernel")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", has_none)
    assert told()["attention"] == ("warning", "torch has no kernel")


def test_configs_are_found_here_before_the_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packed = find_shipped_folder("configs") / "trials" / "lora.yaml"
    assert find_config("shipped:trials/lora.yaml") == packed
    assert find_config("configs/trials/lora.yaml") == packed
    mine = tmp_path / "configs" / "trials" / "lora.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("name: mine\n")
    assert find_config("configs/trials/lora.yaml").resolve() == mine
    assert find_config("shipped:trials/lora.yaml") == packed
    with pytest.raises(ConfigError):
        find_config("shipped:../pyproject.toml")
    with pytest.raises(ConfigError, match=r"did you mean configs/trials/lora\.yaml"):
        find_config("configs/trials/lore.yaml")


def step(number: int) -> StepFinished:
    return StepFinished(
        step=number, total_steps=100, epoch=0.1, loss=1.25, learning_rate=1e-3,
        grad_norm=1.0, tokens_per_s=1234.0, tokens=9, memory_bytes=1_500_000_000, eta_s=65.0,
    )  # fmt: skip


def test_plain_progress_throttles_steps_but_never_the_last() -> None:
    written: list[str] = []
    plain = PlainProgress(written.append)
    for number in range(1, 101):
        plain.show(step(number))
    assert written == [format_step(step(1)), format_step(step(100))]
    assert format_step(step(100)) == "step 100/100  loss 1.2500  lr 1.00e-03  1,234 tokens/s  1.5 GB  eta 1m05s"


def test_events_in_words() -> None:
    assert format_event(Evaluated(step=5, loss=0.5, accuracy=0.25, best=True)) == [
        "step 5  validation loss 0.5000  accuracy 25.0 %  best so far"
    ]
    assert format_event(RunResumed(5)) == ["resumed at step 5"]
    assert [format_duration(seconds) for seconds in (0.4, 59, 61, 3725)] == ["0s", "59s", "1m01s", "1h02m"]


def test_what_to_do_next() -> None:
    stopped = TrialResult(status="interrupted", steps=3, name="x", run="/r")
    assert "--resume" in list_next_steps(stopped)[0]
    done = TrialResult(status="done", name="x", steps=3, version=2, run="/r", folder="/a", registry="/reg")
    assert any("adapters promote x@2 --registry /reg" in line for line in list_next_steps(done))
    elsewhere = done.model_copy(update={"registry": "/a b"})
    assert any("adapters promote x@2 --registry '/a b'" in line for line in list_next_steps(elsewhere))


def test_ctrl_c_interrupts_at_the_next_event_and_the_second_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[Event] = []
    event = PhaseStarted("launch", "connecting to Ray")
    before = signal.getsignal(signal.SIGINT)
    with interrupt_at_events(seen.append) as show:
        show(event)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            show(event)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert seen == [event]
    assert "press Ctrl-C again" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
