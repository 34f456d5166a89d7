"""`--resume` goes on with the data and the base that a run or study began with, and with nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankloom.config import TrialConfig, parse
from rankloom.data import load_data
from rankloom.errors import DataError, ModelError
from rankloom.events import Event, WarningRaised
from rankloom.launch.results import TrialResult
from rankloom.launch.trainer import train_trial
from rankloom.models import load_base, load_tokenizer
from rankloom.training.resume_check import ORIGIN, Origin, find_study_warning, hold_study_to

TEXTS = ("my card was lost", "transfer money to a friend")


def write(file: Path, labels: str) -> None:
    rows = [f"{TEXTS[i % 2]} {i},{labels[i % 2]}" for i in range(40)]
    file.write_text("\n".join(["text,label", *rows]) + "\n")


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Path) -> Callable[..., TrialConfig]:
    """A trial on files of its own; keywords replace whole sections."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    for name in ("train", "validation", "test"):
        write(tmp_path / f"{name}.csv", "ab")
    tree: dict[str, Any] = {
        "name": "tiny",
        "model": {"id": str(tmp_path / "model")},
        "data": {name: str(tmp_path / f"{name}.csv") for name in ("train", "validation", "test")} | {"max_length": 64},
        "method": {"type": "lora", "rank": 2},
        "optim": {"batch_size": 4, "learning_rate": 3e-3},
        "budget": {"steps": 2},
        "eval": {"every": 2, "latency": False, "max_rows": 4, "max_test_rows": 4, "base": False},
        "compute": {"num_workers": 0, "device": "cpu", "cpus_per_worker": 1},
        "output": {"root": str(tmp_path / "out")},
    }

    def made(**changed: Any) -> TrialConfig:
        return parse(TrialConfig, tree | changed)

    train_trial(made())
    return made


def go_on(make: Callable[..., TrialConfig], steps: int = 4) -> tuple[TrialResult, list[Event]]:
    events: list[Event] = []
    return train_trial(make(budget={"steps": steps}), resume=True, on_event=events.append), events


@pytest.mark.parametrize("name", ["train", "validation"])
def test_other_labels_under_the_same_texts_are_refused(
    name: str, make: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    write(tmp_path / f"{name}.csv", "ba")
    with pytest.raises(
        DataError, match=r"--resume: the rows of data\.train=.* have changed since the start .* restore them, or"
    ):
        go_on(make)
    write(tmp_path / f"{name}.csv", "ab")
    write(tmp_path / "test.csv", "ba")  # nothing that was trained or chosen depends on them
    done, events = go_on(make)
    assert done.steps == 4
    assert not [event for event in events if isinstance(event, WarningRaised)]


def test_another_base_at_the_same_place_is_refused(make: Callable[..., TrialConfig], tmp_path: Path) -> None:
    file = tmp_path / "model" / "model.safetensors"
    sound = file.read_bytes()
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj" in name)
    save_file(tensors | {name: tensors[name] + 0.1}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"--resume: the weights of model\.id=.* have changed since the start"):
        go_on(make)
    file.write_bytes(sound)
    assert go_on(make)[0].steps == 4


def test_other_settings_of_the_base_are_refused(make: Callable[..., TrialConfig], tmp_path: Path) -> None:
    file = tmp_path / "model" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    with pytest.raises(
        ModelError, match=r"--resume: the settings in config\.json of model\.id=.* have changed since the start"
    ):
        go_on(make)
    file.write_text(json.dumps(settings | {"transformers_version": "0.0.1"}, indent=1))
    assert go_on(make)[0].steps == 4


def test_other_versions_are_told(make: Callable[..., TrialConfig], tmp_path: Path) -> None:
    latest = max((tmp_path / "out" / "runs" / "tiny" / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    origin = json.loads((latest / ORIGIN).read_text())
    origin["versions"]["peft"] = "0.0.1"
    (latest / ORIGIN).write_text(json.dumps(origin))
    _, events = go_on(make)
    [warning] = [event.message for event in events if isinstance(event, WarningRaised)]
    assert "peft 0.0.1 -> " in warning
    for place in (tmp_path / "out" / "runs" / "tiny" / "checkpoints").glob(f"*/{ORIGIN}"):
        place.unlink()  # as an earlier rankloom left it
    assert go_on(make, steps=6)[0].steps == 6


def test_a_study_is_held_to_its_data_and_bases(make: Callable[..., TrialConfig], tmp_path: Path) -> None:
    trial, study = make(), tmp_path / "study"

    def now() -> Origin:
        base = load_base(trial.model, trial.quantization, device=torch.device("cpu"))
        return Origin.collect(load_data(trial.data, load_tokenizer(trial.model)), base)

    hold_study_to(study, trial, now())
    hold_study_to(study, trial, now())
    assert find_study_warning(study) is None
    write(tmp_path / "train.csv", "ba")
    with pytest.raises(DataError, match="--resume: the rows"):
        hold_study_to(study, trial, now())
    other = make(data={"train": str(tmp_path / "validation.csv"), "max_length": 64})
    hold_study_to(study, other, now())  # other trials of the same study, by their own settings
