"""`import rankloom as rl` on a Ray that runs already: the examples of its docstrings run as they stand."""

from __future__ import annotations

import doctest
import io
import shutil
from pathlib import Path

import pytest

import rankloom as rl

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def _in_a_users_folder(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with what the examples name, and a home of its own."""
    texts = {"card_lost": "my card was lost", "transfer": "transfer money to a friend"}
    rows = [f"{text} {i},{label}" for i in range(48) for label, text in texts.items()]
    (tmp_path / "tickets.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    shutil.copytree(tiny_llama, tmp_path / "Qwen" / "Qwen3-0.6B")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RANKLOOM_REGISTRY")


class _WithoutRaysOwn(doctest.OutputChecker):
    """Compares all but what Ray's processes write, such as that Serve's controller ended."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        ours = [line for line in got.splitlines(keepends=True) if "(raylet)" not in line]
        return super().check_output(want, "".join(ours), optionflags)


@pytest.mark.usefixtures("_in_a_users_folder")
def test_the_examples_of_the_docstrings_run() -> None:
    import ray
    from ray import serve

    for verb in (rl.train, rl.evaluate, rl.tune, rl.serve):
        (example,) = doctest.DocTestFinder(recurse=False).find(verb)
        told = io.StringIO()
        outcome = doctest.DocTestRunner(_WithoutRaysOwn(), verbose=False).run(example, out=told.write)
        assert (outcome.failed, outcome.attempted > 1) == (0, True), told.getvalue()
    assert ray.is_initialized()
    assert not serve.status().proxies  # it was started for the endpoint, and ended with it
