"""`rl.report` and `rankloom report`: what they find, what they refuse, and a trial's page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

import rankloom as rl
from made_study import make_study
from rankloom.cli import main
from rankloom.cli.report import complete_subject
from rankloom.config import CompareConfig, dump, parse
from rankloom.reporting.comparison import make_comparison_page
from rankloom.reporting.run import make_run_page
from rankloom.reporting.write import find_folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a study in the default root."""
    monkeypatch.setenv("HOME", str(tmp_path))
    make_study(tmp_path / "rankloom" / "studies" / "tickets")
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_a_study_is_found_by_name_and_by_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = home / "rankloom" / "studies" / "tickets"
    assert find_folder("tickets") == find_folder(str(folder)) == folder
    assert complete_subject("ti") == ["tickets"]
    assert complete_subject("x") == []
    slides = home / "slides"
    assert run("report", "tickets", "--output", str(home / "new" / "r.html"), "--png", str(slides)) == 0
    assert str(home / "new" / "r.html") in capsys.readouterr().out
    assert (home / "new" / "r.html").read_text().startswith("<!doctype html>")
    with Image.open(slides / "curves-loss.png") as picture:
        assert picture.width >= 1600
    assert rl.report(folder) == folder / "report.html"


def test_what_can_not_be_reported_is_refused_in_a_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for subject, told in (
        ("tickes", "no such study, run or comparison; did you mean 'tickets'?"),
        (str(home), "holds none of study.yaml, trial.yaml, compare.yaml"),
        ("s3://bucket/runs/x", "a report reads local folders"),
    ):
        assert run("report", subject) == 2
        assert told in capsys.readouterr().err
    (home / "file").write_text("")
    assert run("report", "tickets", "--output", str(home / "file" / "r.html")) == 1
    assert "choose another file" in capsys.readouterr().err
    assert run("report", "tickets", "--png", str(home / "file")) == 1
    assert "choose another folder" in capsys.readouterr().err
    run_folder = home / "rankloom" / "runs" / "tickets"
    run_folder.mkdir(parents=True)
    (run_folder / "trial.yaml").write_text("name: tickets\n")
    assert run("report", "tickets") == 2
    assert "2 folders have this name" in capsys.readouterr().err


def test_a_trials_page_has_its_scores_and_curves(last_version: Path) -> None:
    page = make_run_page(last_version / "runs" / "finished")
    assert [section.id for section in page.sections] == ["scores", "curves", "data", "environment", "repeat"]
    card = json.loads((last_version / "runs" / "finished" / "result.json").read_text())["scorecard"]
    share = 100 * card["result"]["accuracy"]["value"]
    assert f"accuracy {share:.1f} %" in page.summary[0]
    assert "tied" in page.summary[0]  # five test rows decide nothing
    loss = next(chart for chart in page.charts if chart.id == "curves-loss")
    assert {each["group"] for each in loss.spec["data"]["values"]} == {"training", "validation"}


def test_a_trial_that_was_stopped_is_reported_as_far_as_it_is(last_version: Path) -> None:
    page = make_run_page(last_version / "runs" / "stopped")
    assert "not finished" in page.summary[0]
    assert "curves" in [section.id for section in page.sections]


def test_a_comparison_is_found_and_shows_the_study_that_it_is_in(home: Path) -> None:
    folder = home / "rankloom" / "comparisons" / "methods"
    folder.mkdir(parents=True)
    (folder / "compare.yaml").write_text(yaml.safe_dump(dump(parse(CompareConfig, {"name": "methods"}))))
    assert complete_subject("m") == ["methods"]
    assert rl.report("methods").read_text().count("No trial has begun yet.") == 1
    make_study(folder / "studies" / "methods", done=False)
    page = make_comparison_page(folder)
    assert page.title == "methods"
    assert page.summary[0].startswith("The comparison is not finished")
    assert {"leaderboard", "curves"} <= {section.id for section in page.sections}
    assert find_folder("tickets").parent.name == "studies"
    shutil.copytree(folder, folder.with_name("tickets"))
    assert run("report", "tickets") == 2  # a study has the name too
