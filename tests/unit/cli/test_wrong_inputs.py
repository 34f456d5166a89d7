"""What users get wrong, through the real command line: one clear line, the right exit code, nothing half-written.

Most run in this process; those that need a signal, a pipe or a mount of their own run `python -m rankloom.cli`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankloom.cli import main
from rankloom.config import TrialConfig, load
from rankloom.events import Evaluated, Event, StepFinished
from rankloom.launch.trainer import train_trial
from rankloom.paths import find_shipped_folder

SOURCE = Path(__file__).resolve().parents[3] / "platform"
CLI = [sys.executable, "-m", "rankloom.cli"]
WEIGHTS = "model.safetensors"
TEXTS = {"card_lost": "my card was lost", "transfer": "transfer money to a friend"}
ROWS = "".join(f"{text} {i},{label}\n" for i in range(32) for label, text in TEXTS.items())
LONG = ("budget.steps=120", "eval.every=20")
"""A run of a second or two: long enough to be interrupted."""


@pytest.fixture
def trial(tmp_path: Path, tiny_llama: Path) -> Path:
    """A trial's file; its results go to `tmp_path / "out"`."""
    (tmp_path / "rows.csv").write_text("text,label\n" + ROWS)
    settings: dict[str, Any] = {
        "name": "tiny",
        "model": {"id": str(tiny_llama)},
        "data": {"train": str(tmp_path / "rows.csv"), "max_length": 64},
        "method": {"type": "lora", "rank": 2},
        "optim": {"batch_size": 4, "learning_rate": 3e-3},
        "budget": {"steps": 4},
        "eval": {"every": 2, "latency": False, "max_rows": 6, "max_test_rows": 6},
        "compute": {"num_workers": 0, "device": "cpu", "cpus_per_worker": 1},
        "output": {"root": str(tmp_path / "out")},
    }
    file = tmp_path / "trial.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Cli:
    """The command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], root: Path) -> None:
        self._capsys, self.root = capsys, root

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; any exception but SystemExit is a stack trace in the user's terminal."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(each) for each in arguments])
        captured = self._capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    def fails(self, code: int, *arguments: object) -> str:
        """The one line of a command that is refused."""
        found, _, text = self(*arguments)
        assert found == code, text
        assert text.startswith("error: ")
        assert len(text.splitlines()) == 1
        assert "the full trace is in" not in text  # that would be for our own mistakes
        return text

    def json(self, *arguments: object) -> Any:
        """The stdout of a command with --json, and nothing else is there."""
        code, text, err = self(*arguments, "--json")
        assert code == 0, err
        return json.loads(text)

    def untouched(self) -> bool:
        """Nothing is left but a lock."""
        return not [p for p in self.root.rglob("*") if p.is_file() and p.suffix != ".lock"]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return Cli(capsys, tmp_path / "out")


def changed(folder: Path, target: Path, file: str, change: Callable[[bytes], bytes | None]) -> Path:
    """A copy of a folder in which one file is different, or gone."""
    shutil.copytree(folder, target)
    content = change((target / file).read_bytes())
    (target / file).unlink()
    if content is not None:
        (target / file).write_bytes(content)
    return target


# Settings: exit code 2, before anything is loaded


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method.rnk=8"], "method.rnk: unknown key; did you mean 'rank'?"),
        (["optm.batch_size=2"], "optm: unknown key; did you mean 'optim'?"),
        (["zzz=2"], "zzz: unknown key; known keys: budget, compute,"),
        (["optim.batch_size=many"], "optim.batch_size: Input should be a valid integer"),
        (["optim.batch_size=many"], "(given 'many')"),
        (["method.rank=2.5"], "method.rank: Input should be a valid integer"),
        (["method.rank=0"], "method.rank: Input should be greater than or equal to 1 (given 0)"),
        (["optim.learning_rate=.nan"], "optim.learning_rate: Input should be a finite number"),
        (["name=../up"], "name: String should match"),
        (["method=lora"], "method: expected a mapping of settings (given 'lora')"),
        (["method.type=lorra"], "allowed: 'full', 'lora', 'dora', 'adalora', 'galore', 'lisa'"),
        (["method.type=qlora"], "QLoRA is `method: {type: lora}` with `quantization: nf4`"),
        (["quantization=int4"], "quantization.type: unknown type 'int4'; allowed: 'none', 'int8', 'nf4'"),
        (["data.columns={lable: x}"], "unknown column 'lable'; allowed: completion, instruction, label,"),
        (["data.train={}"], "data.train.path: required, but not given"),
        (["steps"], "override 'steps': expected key=value, for example"),
        (["method={type: full}", "quantization=nf4"], "method.type=full changes the base's weights"),
        (["method={type: galore}", "optim.loraplus_ratio=16"], "optim.loraplus_ratio=16 needs A and B"),
        (["method.init=pissa", "quantization=int8"], "method.init=pissa rewrites the base's weights"),
        (["method={type: galore, layerwise: true}"], "before optim.clip_norm could act on it"),
        (["output.keep_model=true"], "output.keep_model saves the whole tuned model, for full, galore and lisa"),
        (["output.root=s3://bucket/x"], "compute.num_workers=0 keeps checkpoints on a local disk; give a folder"),
        (["optim.accumulation=9"], "optim.batch_size=4 leaves some of"),
        (["method.init=orthogonal", "method.rank=5"], "method.init=orthogonal needs an even rank, not method.rank=5"),
        (["method={type: full}", "model.dtype=fp16"], "method.type=full trains the base's own weights, and in fp16"),
        (["method.target_modules=[q_proj]", "method.target_modules.0=v_proj"], "method.target_modules is a list; give"),
        (["budget={steps: 4, epochs: 3}"], "give epochs (3.0) or steps (4), not both"),
        (["method={type: adalora, target_rank: 12}"], "target_rank 12 must be below initial_rank 12"),
    ],
)
def test_a_wrong_setting(overrides: list[str], expected: str, trial: Path, cli: Cli) -> None:
    text = cli.fails(2, "train", trial, *overrides)
    assert expected in text
    assert not cli.root.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "did you mean"),
        ("", "expected a mapping of settings, found NoneType"),
        ("- name: tiny\n", "expected a mapping of settings, found list"),
        ("name: [\n", "not valid YAML"),
        ("name: a\nname: b\n", "key 'name' is given twice"),
        (b"\xff\xfe\x00", "not valid YAML"),
    ],
)
def test_a_wrong_config_file(content: str | bytes | None, expected: str, trial: Path, cli: Cli) -> None:
    file = trial.with_name("trail.yaml")
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    text = cli.fails(2, "train", file)
    assert "trail.yaml" in text
    assert expected in text


# Data: exit code 1, nothing trained, and the corrected trial may have the name


def chat(role: str) -> str:
    return "".join(json.dumps({"messages": [{"role": role, "content": f"hi {i}"}]}) + "\n" for i in range(9))


def pair(completion: str) -> str:
    return "".join(json.dumps({"prompt": f"ask {i}", "completion": completion}) + "\n" for i in range(9))


@pytest.mark.parametrize(
    ("name", "content", "overrides", "expected"),
    [
        ("rowz.csv", None, [], "data.train: no file '{file}'; did you mean 'rows.csv'?"),
        ("empty.csv", "", [], "data.train: {file} is empty"),
        ("empty.jsonl", "", [], "data.train: {file} is empty"),
        ("empty.parquet", "", [], "data.train: {file} is empty"),
        ("header.csv", "text,label\n", [], "data.train: {file} has no rows"),
        ("a.csv", "message,category\n" + ROWS, [], "{file} has 'message', 'category'; formats need chat: messages;"),
        ("a.csv", "text,lable\n" + ROWS, ["data.format=classification"], "the column 'label'; did you mean 'lable'?"),
        ("a.csv", "text,kind\n" + ROWS, ["data.columns={label: knd}"], "no column 'knd'; did you mean 'kind'?"),
        ("a.csv", "text,label\n,a\n,b\n", [], "none of its 2 rows can be used: 2 without a prompt or a completion"),
        ("a.csv", "text,label\nhi,a\n", [], "at least 3 different prompts are needed; add rows, or give data.test"),
        ("a.csv", "text,label\none, two,a\n", [], "quote texts that hold a comma"),
        ("a.csv", "text;label\none, two;a\n", [], "it is separated by ';', not by commas"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', [], "it is not UTF-8 (line 1); save it as UTF-8"),
        ("a.csv", b"text,label\n\xff\xfe,a\n", [], "{file} can't be read as csv"),
        ("a.jsonl", '{"text": "a", "label"\n', [], "{file} can't be read as json"),
        ("a.parquet", "no parquet", [], "{file} can't be read as parquet"),
        ("a.jsonl", chat("user"), [], "none of its 9 rows can be used: 9 without a prompt or a completion"),
        ("a.jsonl", pair("word " * 300), [], "9 whose completion does not fit in data.max_length=64"),
        ("a.jsonl", pair("word " * 300), ["data.over_long=error"], "row 1: its completion of 1202 tokens does not fit"),
    ],
)  # fmt: skip
def test_data_that_can_not_be_trained_on(
    name: str, content: str | bytes | None, overrides: list[str], expected: str, trial: Path, cli: Cli
) -> None:
    file = trial.with_name(name)
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    text = cli.fails(1, "train", trial, f"data.train={file}", *overrides)
    assert expected.format(file=file) in text
    assert cli.untouched()


def test_a_test_set_that_does_not_go_with_the_training_rows(trial: Path, cli: Cli) -> None:
    other = trial.with_name("other.csv")
    other.write_text("text,label\nhello,transfr\n")
    text = cli.fails(1, "train", trial, f"data.test={other}")
    assert "data.test: row 1: the label 'transfr' is none of the 2 labels of data.train; near it: 'transfer'" in text
    assert cli.untouched()
    assert cli.json("train", trial)["version"] == 1  # the name was not used up


@pytest.mark.parametrize("overrides", [["data.format=text"], ["data={train: words.jsonl}"]])
def test_accuracy_of_data_without_labels(
    overrides: list[str], trial: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trial.parent)
    Path("words.jsonl").write_text("".join(json.dumps({"text": f"some words {i}"}) + "\n" for i in range(20)))
    text = cli.fails(2, "train", trial, "eval.metric=accuracy", *overrides)
    assert "eval.metric: accuracy needs classification data (text, label); use loss" in text
    assert cli.untouched()


# Models: exit code 1 (a setting that can't be meant: 2)


@pytest.mark.parametrize(
    ("model", "code", "expected"),
    [
        ("nobody/nothing", 1, "model.id: 'nobody/nothing' is not a local folder, and the hub does not give it"),
        ("./nowhere", 1, "model.id: no folder or file './nowhere'"),
        ("two words", 1, "model.id: 'two words' is neither a folder nor a valid hub id"),
        ("builtin:smolm2", 2, "model.id: unknown 'builtin:smolm2'; allowed: builtin:smollm2,"),
        ("rows.csv", 2, "rows.csv' is a file, but not a .gguf; give the model's folder"),
    ],
)
def test_a_model_that_is_not_there(
    model: str, code: int, expected: str, trial: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trial.parent)
    assert expected in cli.fails(code, "train", trial, f"model.id={model}")
    assert cli.untouched()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("config.json", lambda _: None, "holds no config.json; it is not a transformers model folder"),
        ("config.json", half, "config.json' is not a valid JSON file"),
        ("config.json", lambda _: b"[]", "its config.json can't be read"),
        ("config.json", lambda c: c.replace(b'"llama"', b'"lama"'), "model type `lama`"),
        ("tokenizer.json", half, "has no usable tokenizer"),
        (WEIGHTS, lambda _: None, "holds no *.safetensors; other weight formats can run code and are not read"),
        (WEIGHTS, half, "a weight file is missing, corrupt or truncated"),
        (WEIGHTS, lambda c: c[:-4], "a weight file is missing, corrupt or truncated"),
        (WEIGHTS, lambda _: b"", "a weight file is missing, corrupt or truncated"),
        (WEIGHTS, lambda _: b"<html>not found</html>", "a weight file is missing, corrupt or truncated"),
        (WEIGHTS, lambda c: c[:-4000] + b"\xff" * 4000, "before any training: check the weights"),
    ],
)
def test_a_damaged_model_folder(
    file: str, change: Callable[[bytes], bytes | None], expected: str, trial: Path, tiny_llama: Path, cli: Cli
) -> None:
    folder = changed(tiny_llama, trial.with_name("broken"), file, change)
    text = cli.fails(1, "train", trial, f"model.id={folder}")
    assert str(folder) in text
    assert expected in text
    assert cli.untouched()


def test_a_pickle_beside_is_no_substitute_for_safetensors(trial: Path, tiny_llama: Path, cli: Cli) -> None:
    folder = changed(tiny_llama, trial.with_name("pickled"), WEIGHTS, lambda _: None)
    torch.save(load_file(tiny_llama / WEIGHTS), folder / "pytorch_model.bin")
    assert "save it with save_pretrained" in cli.fails(1, "train", trial, f"model.id={folder}")


@pytest.mark.parametrize(
    ("quantization", "missing"), [("none", True), ("none", False), ("nf4", True), ("nf4", False), ("int8", False)]
)
def test_a_model_whose_weights_do_not_fit_its_config(
    quantization: str, missing: bool, trial: Path, tiny_llama: Path, cli: Cli
) -> None:
    """Transformers would fill the gap with random numbers, other ones at each load."""
    folder = shutil.copytree(tiny_llama, trial.with_name("gap"))
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if "down_proj" in name)
    tensor = tensors.pop(name)
    if not missing:
        tensors[name] = tensor[:-1].contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text = cli.fails(1, "train", trial, f"model.id={folder}", f"quantization={quantization}")
    assert "1 tensor(s) that its config.json asks for are missing from its weight files or have another shape" in text
    assert f"such as {name}" in text
    assert cli.untouched()


def test_an_adapter_in_place_of_a_model(trial: Path, cli: Cli) -> None:
    folder = trial.with_name("adapter")
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    text = cli.fails(1, "train", trial, f"model.id={folder}")
    assert "holds an adapter, not a model; give its base, which is 'org/base'" in text


def test_olora_on_layers_that_peft_has_none_for(trial: Path, tiny_model: Callable[..., Path], cli: Cli) -> None:
    text = cli.fails(2, "train", trial, f"model.id={tiny_model('gpt2')}", "method.init=olora")
    assert "method.init=olora: PEFT does not support it on the Conv1D layers of" in text


def test_layers_that_the_model_does_not_have(trial: Path, cli: Cli) -> None:
    text = cli.fails(2, "train", trial, "method.target_modules=[q_prj]")
    assert "method.target_modules: 'q_prj' is not a linear layer of this model; it has down_proj, gate_proj," in text
    assert cli.untouched()


def test_training_that_diverges_keeps_what_was_good(trial: Path, cli: Cli) -> None:
    wild = ["optim.learning_rate=1", "optim.clip_norm=null", "optim.weight_decay=1000", "budget.steps=60"]
    assert "lower optim.learning_rate" in cli.fails(1, "train", trial, *wild)
    assert not (cli.root / "registry").exists()


# Places: exit code 1


def test_a_file_where_a_folder_is_expected(trial: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    text = cli.fails(1, "train", trial, f"output.root={trial}")
    assert f"output.root: {trial}/runs/tiny can't be used" in text
    assert "can't list it: Not a directory" in cli.fails(1, "adapters", "list", "--registry", trial)
    monkeypatch.setenv("RANKLOOM_CACHE", str(trial))
    assert "set RANKLOOM_CACHE" in cli.fails(1, "train", trial)
    assert cli.untouched()


FULL_AND_READ_ONLY = """
import subprocess, sys
from pathlib import Path
from rankloom.cli import main

place, trial = Path(sys.argv[1]), sys.argv[2]

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)

def attempt(title, *arguments):
    print(f"[{title}]", file=sys.stderr)
    try:
        main(arguments)
    except SystemExit as end:
        left = sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file())
        print(f"exit {end.code}\\nleft {left}", file=sys.stderr)

at = [f"output.root={place}/out"]
mount("size=4k")
attempt("full from the start", "train", trial, *at)
mount("size=64k")
attempt("full at the first checkpoint", "train", trial, *at)
mount("size=120k")
attempt("full at the second", "train", trial, *at)
mount("size=1m")
attempt("enough", "train", trial, *at)
subprocess.run(["mount", "-o", "remount,ro", place], check=True)
attempt("read-only", "train", trial, *at, "name=other")
attempt("read-only, resumed", "train", trial, *at, "--resume", "budget.steps=9")
attempt("read-only, promote", "adapters", "promote", "tiny", "--registry", f"{place}/out/registry")
attempt("read-only, export", "adapters", "export", "tiny", "--registry", f"{place}/out/registry", "-o", f"{place}/x")
attempt("read-only, list", "adapters", "list", "--registry", f"{place}/out/registry")
"""


def may_mount() -> bool:
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="needs a mount namespace of its own")
def test_a_full_and_a_read_only_disk(trial: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", FULL_AND_READ_ONLY, str(tmp_path / "small"), str(trial)],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    parts = {}
    for part in ("\n" + done.stderr).split("\n[")[1:]:
        title, _, text = part.partition("]\n")
        parts[title] = text.strip()
    first = parts["full at the first checkpoint"]
    assert "could not write the checkpoint" in first
    assert "No space left on device" in first
    assert "make room, and --resume continues" in first
    assert "checkpoints/" not in first.split("\nleft ")[1]
    second = parts["full at the second"]
    assert "No space left on device" in second
    assert "checkpoints/2/state.pt" in second.split("\nleft ")[1]
    assert ".staged" not in second.split("\nleft ")[1]
    assert "exit 0" in parts["enough"]
    for title in ("read-only", "read-only, resumed", "read-only, promote", "read-only, export"):
        assert parts[title].startswith("error: ")
        assert "Read-only file system" in parts[title]
        assert "exit 1" in parts[title]
    assert "exit 0" in parts["read-only, list"]
    assert parts["full from the start"].startswith("error: output.root: ")
    for title in ("full from the start", "full at the first checkpoint", "full at the second"):
        assert "No space left on device" in parts[title]
        assert "exit 1" in parts[title]
        assert "registry/" not in parts[title]


# Resuming


def test_a_name_is_not_used_twice_and_only_what_exists_is_resumed(trial: Path, cli: Cli) -> None:
    assert "--resume: no run 'tiny' at" in cli.fails(2, "train", trial, "--resume")
    assert not cli.root.exists()
    result = cli.json("train", trial)
    before = {p: p.read_bytes() for p in cli.root.rglob("*") if p.is_file()}
    assert "run 'tiny' exists at" in cli.fails(2, "train", trial)
    text = cli.fails(2, "train", trial, "--resume", "optim.learning_rate=0.1", "method.rank=4")
    assert "method.rank: 2 -> 4; optim.learning_rate: 0.003 -> 0.1; restore them, or start another run" in text
    assert cli.json("train", trial, "--resume") == result
    assert {p: p.read_bytes() for p in cli.root.rglob("*") if p.is_file()} == before


def test_a_run_that_was_killed_before_it_wrote_its_result_is_published_once(trial: Path, cli: Cli) -> None:
    result = cli.json("train", trial)
    (cli.root / "runs" / "tiny" / "result.json").unlink()
    again = cli.json("train", trial, "--resume")
    assert (again["version"], again["adapter"]) == (result["version"], result["adapter"]) == (1, result["adapter"])
    assert cli.json("train", trial, "--resume", "budget.steps=6")["version"] == 2


def test_two_processes_do_not_run_the_same(trial: Path, cli: Cli) -> None:
    config = load(TrialConfig, trial)
    refused: list[str] = []

    def resume_meanwhile(event: Event) -> None:
        if isinstance(event, StepFinished) and event.step == 2:
            refused.append(subprocess.run(
                [*CLI, "train", str(trial), "--resume"], env=environment(), capture_output=True, text=True, check=False
            ).stderr)  # fmt: skip

    assert train_trial(config, on_event=resume_meanwhile).status == "done"
    assert refused == [
        f"error: run 'tiny' at {cli.root}/runs/tiny is running in another process; wait for it, or choose another "
        f"name (name=...)\n"
    ]


@pytest.mark.parametrize("content", [b"", b"model: {id: [", b"name: tiny\nbudg: {}", b"\xff\xfe\x00"])
def test_a_damaged_run(content: bytes, trial: Path, cli: Cli) -> None:
    folder = cli.root / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "trial.yaml").write_bytes(content)
    text = cli.fails(1, "train", trial, "--resume")
    assert f"{folder}/trial.yaml, the run's config, is damaged or from another version of rankloom: " in text
    assert "restore it, or choose another name" in text


def test_a_larger_budget_that_was_interrupted_is_not_finished(trial: Path, cli: Cli) -> None:
    cli.json("train", trial)
    stop = threading.Event()
    stop.set()
    larger = load(TrialConfig, trial, ["budget.steps=8"])
    assert train_trial(larger, resume=True, stop=stop).status == "interrupted"
    assert cli.json("train", trial, "--resume", "budget.steps=8")["steps"] == 8


@pytest.mark.parametrize("file", ["state.pt", "weights.safetensors", "metrics.json"])
def test_a_damaged_checkpoint(file: str, trial: Path, cli: Cli) -> None:
    cli.json("train", trial)
    checkpoints = cli.root / "runs" / "tiny" / "checkpoints"
    latest = checkpoints / "4"
    damaged = latest / file
    sound = damaged.read_bytes()
    for content in (half(sound), b"", b"junk" * 100):
        damaged.write_bytes(content)
        text = cli.fails(1, "train", trial, "--resume", "budget.steps=6")
        assert f"the checkpoint {latest} is damaged" in text
        assert "remove that folder" in text
    shutil.rmtree(latest)
    assert cli.json("train", trial, "--resume", "budget.steps=6")["steps"] == 6


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def stopped(trial: Path, by: signal.Signals, once: str) -> tuple[int, str, str]:
    """Train in a process of its own and send it a signal once an event like `once` was recorded."""
    arguments = [*CLI, "train", str(trial), *LONG]
    events = trial.parent / "out" / "runs" / "tiny" / "events.jsonl"
    with subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if events.is_file() and once in events.read_text():
                process.send_signal(by)
                break
            time.sleep(0.005)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err


def test_ctrl_c_and_kill_lose_nothing(trial: Path, cli: Cli) -> None:
    """Interrupted, killed or neither: the same adapter, bit for bit."""

    def adapter(*options: str) -> bytes:
        folder = Path(cli.json("train", trial, *LONG, *options)["adapter"])
        return (folder / "adapter_model.safetensors").read_bytes()

    whole = adapter()
    checkpoints = cli.root / "runs" / "tiny" / "checkpoints"
    for by in (signal.SIGINT, signal.SIGKILL):
        shutil.rmtree(cli.root)
        code, out, err = stopped(trial, by, '"step": 25,')
        assert "\x1b" not in out + err  # a pipe is no terminal
        assert not (cli.root / "registry").exists()
        kept = max(int(p.name) for p in checkpoints.iterdir())
        if by is signal.SIGINT:
            assert code == 130
            assert "--resume continues" in out
            assert err == (
                "\nstopping after this step, with a checkpoint (or after the scoring, once begun); press "
                "Ctrl-C again to abort now\n"
            )
            assert 25 <= kept < 120
        else:
            assert code == -signal.SIGKILL
            assert kept % 20 == 0
            (checkpoints / ".staged-60").mkdir()  # as if it had been killed while it wrote one
        assert adapter("--resume") == whole
        assert not list(checkpoints.glob(".staged-*"))


def test_a_stop_at_an_evaluated_step_keeps_its_score(trial: Path, cli: Cli) -> None:
    """Else the best checkpoint of the whole run might no longer be known as such."""
    stop = threading.Event()

    def stop_after_evaluation(event: Event) -> None:
        if isinstance(event, Evaluated) and event.step == 2:
            stop.set()

    config = load(TrialConfig, trial)
    assert train_trial(config, stop=stop, on_event=stop_after_evaluation).status == "interrupted"
    metrics = json.loads((cli.root / "runs" / "tiny" / "checkpoints" / "2" / "metrics.json").read_text())
    assert metrics["score"] > -100
    # `stop` is still set: resumed, and stopped again before the next step
    assert train_trial(config, resume=True, stop=stop).steps == 2
    assert json.loads((cli.root / "runs" / "tiny" / "checkpoints" / "2" / "metrics.json").read_text()) == metrics


# What comes after a run


@pytest.fixture
def published(trial: Path, cli: Cli) -> list[str]:
    """`--registry` and the registry that holds tiny@1."""
    return ["--registry", cli.json("train", trial)["registry"]]


def test_an_exported_adapter_is_what_was_trained(
    published: list[str], trial: Path, tiny_llama: Path, tmp_path: Path, cli: Cli
) -> None:
    plain, merged = tmp_path / "plain", tmp_path / "merged"
    assert cli.json("adapters", "export", "tiny", *published, "-o", plain)["folder"] == str(plain)
    assert cli.json("adapters", "export", "tiny", *published, "-o", merged, "--format", "merged")["format"] == "merged"
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
        untuned = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, plain).eval()(ids).logits
        whole = AutoModelForCausalLM.from_pretrained(merged).eval()(ids).logits
    assert torch.allclose(whole, adapted, atol=1e-4)
    assert not torch.allclose(whole, untuned, atol=1e-2)

    of_adapter, of_trial = cli.json("evaluate", "tiny", *published), cli.json("evaluate", trial)
    of_merged = cli.json("evaluate", trial, f"model.id={merged}")
    assert of_adapter["base"]["loss"] == pytest.approx(of_trial["base"]["loss"], rel=1e-6)
    assert of_adapter["result"]["loss"] == pytest.approx(of_merged["base"]["loss"], rel=1e-4)
    assert (of_trial["result"], of_trial["adapter"]) == (None, None)

    for form in ("peft", "merged"):
        assert "exists" in cli.fails(1, "adapters", "export", "tiny", *published, "-o", plain, "--format", form)
    assert cli.json("adapters", "publish", plain, "--name", "again", *published)["version"] == 1


def test_every_json_is_all_there_is_on_stdout(published: list[str], cli: Cli) -> None:
    assert [each["name"] for each in cli.json("adapters", "list", *published)] == ["tiny"]
    for command in (["show", "tiny"], ["verify", "tiny"], ["verify", "tiny", "--no-probe"], ["promote", "tiny"]):
        assert cli.json("adapters", *command, *published)
    assert cli.json("adapters", "show", "tiny@champion", *published)["aliases"] == ["champion"]
    assert cli.json("adapters", "rm", "tiny@1", "--force", *published)["version"] == 1
    assert cli.json("adapters", "list", *published) == []


def test_a_damaged_adapter(published: list[str], tmp_path: Path, cli: Cli) -> None:
    file, target = Path(published[1]) / "tiny" / "1" / "adapter_model.safetensors", tmp_path / "exported"
    sound = file.read_bytes()
    for content in (half(sound), b"", sound[:-4] + b"\0\0\0\1", None):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        for command in (
            ["evaluate", "tiny"],
            ["adapters", "verify", "tiny", "--no-probe"],
            ["adapters", "export", "tiny", "-o", target],
            ["adapters", "export", "tiny", "-o", target, "--format", "merged"],
            ["adapters", "publish", file.parent, "--name", "again"],
        ):
            text = cli.fails(1, *command, *published)
            assert "tiny@1 is broken: adapter_model.safetensors" in text
        assert not target.exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert [each["name"] for each in cli.json("adapters", "list", *published)] == ["tiny"]


def test_a_wrong_adapter(published: list[str], cli: Cli) -> None:
    for command, expected in {
        "evaluate tinny": "no adapter 'tinny' in",
        "adapters show tinny": "did you mean tiny?",
        "evaluate tiny@9": "tiny has no version 9; it has 1",
        "evaluate tiny@prod": "tiny has no alias 'prod'",
        "adapters rollback tiny": "tiny has no alias 'champion'",
        "adapters rm tiny@2": "tiny has no version 2; it has 1",
        "adapters publish nowhere --name x": "nowhere: no such folder; give a folder",
    }.items():
        assert expected in cli.fails(1, *command.split(), *published)
    for command, expected in {
        "evaluate tiny@": "after the @ comes a version",
        "adapters show ../tiny": "adapter name '../tiny': allowed are",
        "adapters promote tiny --alias 7": "alias '7': allowed are",
    }.items():
        assert expected in cli.fails(2, *command.split(), *published)


# Pipes and shells


def test_a_pipe_gets_plain_text(trial: Path) -> None:
    for arguments, code in ((["--help"], 0), (["train"], 2), (["train", str(trial), "method.rnk=8"], 2)):
        done = subprocess.run([*CLI, *arguments], env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert "\x1b" not in done.stdout + done.stderr
        assert bool(done.stdout) == (code == 0)


def test_the_schema_is_one_and_accepts_what_the_config_does(trial: Path, cli: Cli) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    code, text, _ = cli("schema", "trial")
    assert code == 0
    validator = jsonschema.Draft202012Validator(json.loads(text))
    validator.check_schema(validator.schema)
    for file in (trial, *sorted(find_shipped_folder("configs").rglob("trials/*.yaml"))):
        validator.validate(yaml.safe_load(file.read_text()))
    assert list(validator.iter_errors({"name": "tiny", "sead": 1}))


def completion(registry: str, **variables: str) -> str:
    own = environment() | variables | {"RANKLOOM_REGISTRY": registry}
    return subprocess.run(CLI, env=own, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell: str, tmp_path: Path) -> None:
    script = completion(str(tmp_path), _RANKLOOM_COMPLETE=f"source_{shell}")
    assert f"_RANKLOOM_COMPLETE=complete_{shell}" in script


def test_completion_knows_commands_and_adapters(published: list[str]) -> None:
    def completed(words: str) -> list[str]:
        position = str(words.count(" "))
        asked = {"_RANKLOOM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": position}
        return completion(published[1], **asked).split()

    assert completed("rankloom tr") == ["train"]
    assert completed("rankloom adapters show ti") == ["tiny"]
