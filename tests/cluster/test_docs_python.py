"""The documents' Python and examples/ run as they stand, on a tiny model and 96 rows."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "examples"
TEXTS = {"lost_card": "my card was lost", "change_pin": "how do i change the pin of my card"}
pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_serve")]


def python_of(path: Path) -> list[tuple[int, str]]:
    """The Python blocks of a document, each with its line."""
    tokens = MarkdownIt().parse(path.read_text(encoding="utf-8"))
    return [(t.map[0] + 1, t.content) for t in tokens if t.type == "fence" and t.info.startswith("python") and t.map]


PAGES = [path for path in [*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md")] if python_of(path)]


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the data that the documents speak of; the registry is the default one of a home there."""
    rows = [f"{text} {number},{label}" for number in range(48) for label, text in TEXTS.items()]
    (tmp_path / "tickets.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RANKLOOM_REGISTRY", str(tmp_path / "rankloom" / "registry"))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_python_of_a_document_runs(page: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from endpoint import endpoint

    names: dict[str, Any] = {"__name__": "__main__"}
    with endpoint(tmp_path / "echo") as made:  # where a document asks an endpoint that runs already
        for line, code in python_of(page):
            for shown, here in (
                ("Qwen/Qwen3-0.6B", str(tiny_llama)),
                ("rl.check_data({", f'rl.check_data({{"model": {str(tiny_llama)!r}, '),
                ("http://127.0.0.1:8000", made.url),
                ('budget={"steps": 60}', 'budget={"steps": 6}, compute={"num_workers": 0}'),
                ('budget={"steps": 10}', 'budget={"steps": 6}, compute={"num_workers": 0}'),
                ('"steps": 60', '"steps": 6'),
                ('"num_trials": 4', '"num_trials": 2'),
                ('model="tickets@champion", messages', 'model="bank@1", messages'),
                ('model="tickets@champion", input', 'model="bank@1", input'),
            ):
                code = code.replace(shown, here)
            exec(compile(code, f"{page.relative_to(REPO)}:{line}", "exec", dont_inherit=True), names)


def example(name: str) -> Callable[..., Any]:
    main: Callable[..., Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return main


def test_every_example_is_short_and_says_how_it_is_run() -> None:
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 40, path
        assert f"python examples/{path.name}" in text, path


def test_examples_train_tune_serve_and_ask(
    tiny_trial: Callable[..., dict[str, Any]], tiny_study: Callable[..., dict[str, Any]], desk: Path
) -> None:
    output = {"root": str(desk / "rankloom")}
    here = {"num_workers": 0, "device": "cpu"}  # test_launch.py has workers
    (desk / "trial.yaml").write_text(yaml.safe_dump(tiny_trial(output=output, compute=here)))
    study = tiny_study(search={"num_trials": 3}, final={"top_k": 1})
    study["trial"]["output"] = output
    (desk / "study.yaml").write_text(yaml.safe_dump(study | {"name": "search"}))
    (desk / "serve.yaml").write_text(yaml.safe_dump({"adapters": ["tiny@1"], "port": 0}))
    trained = example("train")("trial.yaml")
    assert trained.adapter == "tiny@1"
    tuned = example("tune")("study.yaml")
    assert len(tuned.trials) == 3
    assert tuned.adapter == "search@1"
    assert set(example("serve")("tiny@1", "my card was lost")) == {"tiny@1", "base"}
    assert "tiny@1" in example("ask")("serve.yaml", "my card was lost")
