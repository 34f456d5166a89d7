"""A study that the last version began and that was stopped is continued by this one."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from rankloom.config import StudyConfig, parse
from rankloom.registry import Registry
from rankloom.search.study import tune

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def test_studies_of_the_last_version_continue(last_version: Path) -> None:
    def study(name: str) -> StudyConfig:
        return parse(StudyConfig, yaml.safe_load((last_version / "studies" / name / "study.yaml").read_text()))

    before = json.loads((last_version / "studies" / "finished" / "result.json").read_text())
    finished = tune(study("finished"), resume=True).to_dict()
    assert finished["counts"] == before["counts"]
    for key in ("trial", "name"):
        assert finished["winner"][key] == before["winner"][key]
    assert finished["winner"]["scorecard"]["result"]["loss"] == before["winner"]["scorecard"]["result"]["loss"]

    journal = last_version / "studies" / "stopped" / "journal.jsonl"
    began = {line["trial"] for line in map(json.loads, journal.read_text().splitlines())}
    result = tune(study("stopped"), resume=True).to_dict()
    assert result["status"] == "done"
    assert result["counts"] == {"running": 0, "done": 3, "stopped": 0, "failed": 0}
    table = pq.read_table(result["results"]).to_pylist()
    assert {row["trial"] for row in table} == began
    for row in table:
        assert [point["step"] for point in row["curve"]] == list(range(2, 401, 2))  # a report made again is there once
    assert Registry(result["registry"]).verify("stopped@1").lineage.study == "stopped"
