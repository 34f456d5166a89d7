"""A study's report: its sentence, its sections, and charts that Vega-Lite draws."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import vl_convert

from made_study import make_study
from rankloom.config.space import Choice, RandInt
from rankloom.errors import RankloomError
from rankloom.pages.html import render, size_chart
from rankloom.pages.pieces import Chart, Page, Table
from rankloom.reporting.charts import draw_series
from rankloom.reporting.importance import measure_importances
from rankloom.reporting.study import _join, list_stays, make_axis, make_study_page, read_study


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out" / "studies" / "made"


def charts(page: Page) -> dict[str, Chart]:
    return {chart.id: chart for chart in page.charts}


def values(chart: Chart) -> list[dict[str, Any]]:
    layers = chart.spec.get("layer", [])
    found = chart.spec.get("data") or layers[0]["data"]
    return found["values"]  # type: ignore[no-any-return]


def test_a_study_has_every_section_and_its_result_in_a_sentence(folder: Path, tiny_llama: Path) -> None:
    make_study(folder, num_trials=24, model=str(tiny_llama))
    page = make_study_page(folder)
    assert [section.id for section in page.sections] == [
        "scores", "leaderboard", "curves", "knobs", "branches", "costs", "timeline", "data", "environment", "repeat",
    ]  # fmt: skip
    winner = next(line.mark for line in _table(page, "leaderboard").lines)
    assert re.fullmatch(
        rf"The winner {winner} \(\w+\) is better than the baseline made-0000 on the test rows: accuracy 75\.0 % "
        r"against 50\.0 %, a difference of \+25\.0 points \[\+15\.\d, \+33\.\d\]\.",
        page.summary[0],
    )
    html = render(page)
    assert "accuracy 75.0\u00a0% against" in html  # no line breaks between a number and its unit
    assert f"rankloom tune {folder}/study.yaml name=made-again" in html
    assert "<mark>activate_card&lt;|end|&gt;" in html  # a row with its loss mask


def test_rows_that_can_not_be_read_are_a_note(folder: Path) -> None:
    make_study(folder)
    assert "The rows can&#39;t be read here: " in render(make_study_page(folder))


def test_other_rows_than_the_studys_are_told(folder: Path, tiny_llama: Path) -> None:
    make_study(folder, model=str(tiny_llama))
    origin = folder / "origins" / "0" / "origin.json"
    origin.parent.mkdir(parents=True)
    versions = {"rankloom": "0.1", "torch": "2", "transformers": "5", "peft": "1"}
    origin.write_text(json.dumps({"data": "sha256:other", "base": "sha256:b", "versions": versions}))
    html = render(make_study_page(folder))
    assert "These are not the rows that were trained on" in html
    assert "rankloom 0.1, torch 2" in html


def test_a_tie_is_not_called_a_win(folder: Path) -> None:
    make_study(folder, winner_right=104)
    sentence = make_study_page(folder).summary[0]
    assert "tied" in sentence
    assert "better" not in sentence
    cells = {line.mark: [cell.text for cell in line.cells] for line in _table(make_study_page(folder), "scores").lines}
    assert "tie" in next(iter(cells.values()))


def test_a_study_that_is_not_finished_is_reported_as_far_as_it_is(folder: Path) -> None:
    make_study(folder, done=False)
    page = make_study_page(folder)
    assert page.summary[0].startswith("The study is not finished. So far made-")
    assert "not finished" in page.subject
    assert "scores" not in [section.id for section in page.sections]
    lanes = {each["lane"] for each in values(charts(page)["timeline"])}
    assert lanes == {f"made-{number:04}" for number in range(12)}  # no host has said who was in its slots


def test_a_study_without_a_report_says_so(folder: Path) -> None:
    make_study(folder)
    (folder / "journal.jsonl").write_text("")
    (folder / "result.json").unlink()
    assert make_study_page(folder).summary == ("No trial has reported yet.",)


def test_a_damaged_result_is_refused(folder: Path) -> None:
    make_study(folder)
    (folder / "result.json").write_text("{")
    with pytest.raises(RankloomError, match=r"result\.json is damaged; restore it"):
        make_study_page(folder)


def test_the_knob_that_decides_has_the_importance(folder: Path) -> None:
    make_study(folder, num_trials=48)
    shares = measure_importances(read_study(folder).leaderboard)
    rates = sum(share for name, share in shares.items() if name.endswith("optim.learning_rate"))
    assert rates > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    names = [each["knob"] for each in values(charts(make_study_page(folder))["importance"])]
    assert {"optim.learning_rate (lora)", "optim.learning_rate (dora)", "which branch"} <= set(names)


def test_few_trials_have_no_importance(folder: Path) -> None:
    make_study(folder, num_trials=6)
    assert "importance" not in charts(make_study_page(folder))
    assert "The importance of the knobs needs 10 trials" in render(make_study_page(folder))


def test_every_branch_has_parallel_coordinates_of_its_own_knobs(folder: Path) -> None:
    make_study(folder, num_trials=24)
    found = charts(make_study_page(folder))
    axes = [{each["axis"] for each in values(found[f"parallel-{branch}"])} for branch in (0, 1)]
    assert axes[0] - axes[1] == {"method.dropout"}
    assert all(0 <= each["place"] <= 1 for branch in (0, 1) for each in values(found[f"parallel-{branch}"]))
    last = [each for each in values(found["parallel-0"]) if each["axis"] == "best loss"]
    assert max(last, key=lambda each: each["place"])["value"] == min(each["value"] for each in last)


def test_the_front_is_what_nothing_beats(folder: Path) -> None:
    make_study(folder, num_trials=24)
    points = [
        (each["cost"], each["value"], each["front"])
        for each in values(charts(make_study_page(folder))["pareto-memory"])
    ]
    for cost, value, front in points:
        beaten = any(c <= cost and v <= value and (c, v) != (cost, value) for c, v, _ in points)
        assert front == ("other" if beaten else "front")


def test_stays_are_in_the_slots_and_do_not_overlap(folder: Path) -> None:
    make_study(folder)
    stays = sorted(list_stays(read_study(folder)), key=lambda stay: (stay.lane, stay.start_s))
    assert {stay.lane for stay in stays} == {f"host-1 slot {slot}" for slot in range(4)}
    assert len(stays) == 12
    assert min(stay.start_s for stay in stays) == 0
    for one, other in pairwise(stays):
        assert one.lane != other.lane or one.end_s <= other.start_s


def test_vega_draws_every_chart_with_every_trial(folder: Path) -> None:
    make_study(folder, num_trials=24)
    for chart in make_study_page(folder).charts:
        svg = vl_convert.vegalite_to_svg(size_chart(chart) | {"width": 600})
        drawn = len(re.findall(r'aria-roledescription="(?:point|bar|line mark|text mark)', svg)) or svg.count("<path")
        assert drawn >= 1, chart.id
        assert "NaN" not in svg, chart.id
    points = vl_convert.vegalite_to_svg(size_chart(charts(make_study_page(folder))["effect-0"]) | {"width": 600})
    assert points.count('aria-roledescription="point"') == 23  # all but the baseline


def test_foreign_texts_stay_texts(folder: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    make_study(folder)
    journal = (folder / "journal.jsonl").read_text().splitlines()
    failed = {"v": 1, "time": 1.79e9, "event": "end", "trial": "t3", "status": "failed", "error": evil}
    (folder / "journal.jsonl").write_text("\n".join([*journal, json.dumps(failed)]) + "\n")
    html = render(make_study_page(folder))
    assert evil not in html
    assert html.count("<script") == 3
    assert html.count("</script") == 3
    assert "onerror=alert" not in html.replace("onerror=alert(1)&gt;", "")


def test_values_that_json_lacks_do_not_break_the_page(folder: Path) -> None:
    make_study(folder)
    journal = (folder / "journal.jsonl").read_text()
    (folder / "journal.jsonl").write_text(re.sub(r'"loss": [\d.]+', '"loss": NaN', journal, count=5))
    html = render(make_study_page(folder))
    specs = re.search(r'id="specs">(.*?)</script>', html)
    assert specs is not None
    assert "NaN" not in specs[1]


def test_a_knob_that_is_a_choice_in_one_branch_and_a_range_in_another_has_one_axis() -> None:
    choice, between = make_axis("x", Choice(choice=[4, 8])), make_axis("x", RandInt(randint=(2, 6)))
    assert _join([choice, choice]).choices == ("4", "8")
    assert (_join([choice, between]).choices, _join([between]).low, _join([between]).high) == (None, 2, 6)
    assert [choice.holds(8), choice.holds(5), between.holds(5), between.holds(7), between.holds(None)] == [
        True, False, True, False, False,
    ]  # fmt: skip


def test_a_long_runs_line_is_thinned() -> None:
    points = [(step, 1 / (1 + step)) for step in range(50_000)]
    chart = draw_series({"training": [*points, (50_000, float("inf"))]}, "loss", "c")
    assert 500 <= len(values(chart)) <= 1000


def test_a_report_of_64_trials_is_small(folder: Path) -> None:
    make_study(folder, num_trials=64)
    assert len(render(make_study_page(folder)).encode()) < 5_000_000


def test_a_study_of_the_last_version_is_reported(last_version: Path) -> None:
    for name in ("finished", "stopped"):
        page = make_study_page(last_version / "studies" / name)
        assert page.title == name
        assert {"leaderboard", "curves", "repeat"} <= {section.id for section in page.sections}


def _table(page: Page, id: str) -> Table:
    section = next(section for section in page.sections if section.id == id)
    return next(block for block in section.blocks if isinstance(block, Table))
