"""Jobs on a real cluster that does not have rankloom: ours, and Ray's own `ray job submit`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankloom.registry import Registry

pytestmark = pytest.mark.cluster

REPO = Path(__file__).resolve().parents[2]
Make = Callable[..., dict[str, Any]]


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPO / "platform")}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def submit_with_ray(dashboard: str, *job: str) -> None:
    """Run a script of the source tree by `ray job submit`."""
    submit = ["job", "submit", "--address", dashboard, "--working-dir", str(REPO)]
    done = run("-m", "ray.scripts.scripts", *submit, "--", "python", *job, cwd=REPO)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_followed_job_ends_as_the_command_would(dashboard: str, tiny_trial: Make, tmp_path: Path) -> None:
    settings = tiny_trial(compute={"num_workers": 0, "device": "cpu"})
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(settings))
    command = [
        "-m",
        "rankloom.cli",
        "submit",
        "train",
        "trial.yaml",
        "method.rank=2",
        "--address",
        dashboard,
        "--follow",
    ]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: data.train.path=" in done.stderr  # the cluster happens to share this disk
    assert "step 12/12" in done.stdout
    assert "tiny@1" in done.stdout
    record = Registry(tmp_path / "out" / "registry").get("tiny@1")
    assert record.trial["method"]["rank"] == 2

    again = run(*command, cwd=tmp_path)
    assert again.returncode == 2
    assert "--resume continues it" in again.stdout


def test_ray_job_submit_from_the_source_tree(dashboard: str, tiny_trial: Make, tmp_path: Path) -> None:
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(tiny_trial()))
    submit_with_ray(dashboard, "jobs/train.py", str(tmp_path / "trial.yaml"), "method.rank=4", "--json")
    result = json.loads((tmp_path / "out" / "runs" / "tiny" / "result.json").read_text())
    assert result["status"] == "done"
    assert Registry(tmp_path / "out" / "registry").verify("tiny@1").trial["method"]["rank"] == 4


def study_of(trial: dict[str, Any], **search: Any) -> dict[str, Any]:
    space = {
        "method": {"type": "lora", "rank": {"choice": [2, 4]}},
        "optim": {"learning_rate": {"choice": [1e-3, 1e-2]}},
    }
    shared = {key: value for key, value in trial.items() if key != "name"}
    return {
        "name": "tiny", "trial": shared, "space": [space], "search": search, "hosts": {"num_slots": 2},
        "scheduler": {"type": "fifo"}, "final": {"top_k": 1},
    }  # fmt: skip


@pytest.mark.slow
def test_a_study_is_submitted_and_goes_on_as_one(dashboard: str, tiny_trial: Make, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study_of(tiny_trial(), num_trials=3)))
    command = ["-m", "rankloom.cli", "submit", "tune", "study.yaml", "--address", dashboard, "--follow"]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: trial.data.train.path=" in done.stderr
    assert "winner   tiny-000" in done.stdout
    result = json.loads((tmp_path / "out" / "studies" / "tiny" / "result.json").read_text())
    assert result["counts"] == {"running": 0, "done": 3, "stopped": 0, "failed": 0}
    assert Registry(tmp_path / "out" / "registry").verify("tiny@1").lineage.study == "tiny"

    again = run(*command, cwd=tmp_path)
    assert again.returncode == 2
    assert "study 'tiny' exists" in again.stdout
    assert run(*command, "--resume", cwd=tmp_path).returncode == 0  # a finished one: its result once more

    wrong = run(*command, "search.num_trials=0", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "search.num_trials" in wrong.stderr  # before anything was sent


@pytest.mark.slow
def test_a_comparison_is_submitted_and_ends_with_its_table(dashboard: str, tiny_trial: Make, tmp_path: Path) -> None:
    trial = {key: value for key, value in tiny_trial().items() if key not in ("name", "method")}
    comparison = {"name": "cmp", "trial": trial, "methods": ["lora", "galore"], "seeds": [0, 1]}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(comparison))
    command = ["-m", "rankloom.cli", "submit", "compare", "compare.yaml", "--address", dashboard, "--follow"]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "out" / "comparisons" / "cmp"
    result = json.loads((folder / "result.json").read_text())
    assert result["verdict"][0] in done.stdout
    assert [method["seeds"] for method in result["methods"]] == [[0, 1]] * 2
    assert all(method["cost"]["peak_bytes"] for method in result["methods"])
    assert (folder / "report.html").is_file()
    assert Registry(tmp_path / "out" / "registry").verify("cmp-galore@1").servable == "extracted"

    again = run(*command, cwd=tmp_path)
    assert again.returncode == 2
    assert "comparison 'cmp' exists" in again.stdout


@pytest.mark.slow
def test_ray_job_submit_of_a_study_from_the_source_tree(dashboard: str, tiny_trial: Make, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study_of(tiny_trial(), algorithm="grid")))
    submit_with_ray(dashboard, "jobs/tune.py", str(tmp_path / "study.yaml"), "search.num_trials=2", "--json")
    result = json.loads((tmp_path / "out" / "studies" / "tiny" / "result.json").read_text())
    assert result["status"] == "done"
    assert result["counts"]["done"] == 2


def test_a_job_that_fails_says_why(dashboard: str, tmp_path: Path) -> None:
    command = ["-m", "rankloom.cli", "submit", "evaluate", "no-such-adapter", "--registry", str(tmp_path / "registry")]
    done = run(*command, "--address", dashboard, "--follow", cwd=tmp_path)
    assert done.returncode == 1
    assert "no adapter 'no-such-adapter'" in done.stdout
