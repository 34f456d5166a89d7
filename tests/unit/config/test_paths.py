"""Settings that are paths: marked on their fields, found wherever they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest

from rankloom.config import StudyConfig, TrialConfig, dump, parse
from rankloom.config.base import Frozen
from rankloom.config.paths import IsPath, list_local_inputs, map_paths, resolve_paths
from rankloom.config.serve import ServeConfig


class LexiconConfig(Frozen):
    """A section with a path that no other file knows of."""

    words: Annotated[str, IsPath()] | None = None
    """A file."""


class WithLexicon(TrialConfig):
    """A trial with that section."""

    lexicon: LexiconConfig | None = None
    """The section."""


def marked(config: Frozen) -> set[str]:
    """The dotted names of a config's paths."""
    names: set[str] = set()

    def collect(key: str, value: str, _: IsPath) -> str:
        names.add(key)
        return value

    map_paths(type(config), dump(config), collect)
    return names


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "b.csv", "words.txt"):
        (tmp_path / name).write_text("text,label\n")
    (tmp_path / "model").mkdir()
    return tmp_path


def test_a_new_path_is_resolved_and_warned_of_by_its_mark_alone(here: Path) -> None:
    trial = parse(WithLexicon, {"name": "t", "lexicon": {"words": "words.txt"}})
    resolved = resolve_paths(trial)
    assert resolved.lexicon is not None
    assert resolved.lexicon.words == str(here / "words.txt")
    assert list(list_local_inputs(trial)) == [("lexicon.words", "words.txt")]


def test_every_path_of_a_trial_is_marked(here: Path) -> None:
    tree = {
        "name": "t",
        "model": {"id": "model"},
        "data": {"train": "a.csv", "validation": "a.csv", "test": {"path": "b.csv"}},
        "eval": {"retention": "b.csv"},
        "output": {"root": "out", "registry": "s3://bucket/registry"},
    }
    trial = parse(TrialConfig, tree)
    inputs = {
        "model.id",
        *(f"{name}.path" for name in ("data.train", "data.validation", "data.test", "eval.retention")),
    }
    assert marked(trial) == inputs | {"output.root", "output.registry"}
    assert {name for name, _ in list_local_inputs(trial)} == inputs
    output = resolve_paths(trial).output
    assert (output.root, output.registry) == (str(here / "out"), "s3://bucket/registry")


def test_paths_in_a_studys_branches_and_choices_are_resolved(here: Path) -> None:
    tree: dict[str, Any] = {
        "name": "s",
        "trial": {"data": {"train": "a.csv"}},
        "space": [
            {"data": {"test": {"choice": ["a.csv", "builtin:bank-intents"]}}},
            {"model": {"id": {"choice": ["model", "org/model"]}}, "optim": {"learning_rate": {"uniform": [0.1, 0.2]}}},
        ],
        "search": {"warm_start": [{"data": {"test": {"path": "b.csv"}}}], "algorithm": "optuna", "priors": ["old"]},
    }
    study = parse(StudyConfig, tree)
    resolved = resolve_paths(study)
    assert resolved.trial["data"]["train"] == str(here / "a.csv")
    assert resolved.space[0]["data"]["test"] == {"choice": [str(here / "a.csv"), "builtin:bank-intents"]}
    assert resolved.space[1]["model"]["id"] == {"choice": [str(here / "model"), "org/model"]}
    assert resolved.space[1]["optim"] == tree["space"][1]["optim"]
    assert resolved.search.warm_start == [{"data": {"test": {"path": str(here / "b.csv")}}}]
    assert resolved.search.priors == [str(here / "old")]
    assert list(list_local_inputs(study)) == [
        ("trial.data.train.path", "a.csv"),
        ("space.data.test.path", "a.csv"),
        ("space.model.id", "model"),
        ("search.warm_start.data.test.path", "b.csv"),
    ]


def test_paths_of_a_deployment_are_resolved(here: Path) -> None:
    settings = {"registry": "registry", "auth": {"keys": "keys.json"}, "base": "model", "engine": {"type": "vllm"}}
    config = resolve_paths(parse(ServeConfig, settings | {"adapters": "bank"}))
    assert config.base is not None
    assert (config.registry, config.auth.keys) == (str(here / "registry"), str(here / "keys.json"))
    assert config.base.id == str(here / "model")
