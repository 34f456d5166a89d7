"""What goes wrong in a study, for real: a trial that diverges, one that is stopped, Ctrl-C; and NF4 bases."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from rankloom.config import StudyConfig, parse
from rankloom.registry import Registry
from rankloom.search.study import tune

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Make = Callable[..., dict[str, Any]]
SOURCE = str(Path(__file__).resolve().parents[2] / "platform")


@pytest.mark.usefixtures("local_ray")
def test_a_trial_that_diverges_ends_with_its_reason_and_the_others_go_on(tiny_study: Make) -> None:
    settings = tiny_study(
        space=[
            {"method": {"type": "lora", "rank": 4}, "optim": {"learning_rate": {"choice": [1e-3, 2e-3]}}},
            {
                "method": {"type": "lora", "rank": 2},
                "optim": {"learning_rate": 1, "clip_norm": None, "weight_decay": 1000},
            },
        ],
        search={"algorithm": "grid"},
        scheduler={"type": "fifo"},
    )
    result = tune(parse(StudyConfig, settings))
    assert result.counts == {"running": 0, "done": 3, "stopped": 0, "failed": 1}
    for row in pq.read_table(result.results).to_pylist():
        if json.loads(row["point"]).get("branch") == 1:
            assert "lower optim.learning_rate (1)" in row["error"]
            assert row["steps"] < 27
        else:
            assert [point["step"] for point in row["curve"]] == list(range(3, 28, 3))
            assert row["curve"][-1]["loss"] < row["curve"][0]["loss"]


@pytest.mark.usefixtures("local_ray")
def test_quantised_and_plain_bases_in_one_study(tiny_study: Make) -> None:
    settings = tiny_study(
        space=[
            {"method": {"type": "lora", "rank": 4}, "quantization": {"choice": ["none", "nf4"]}},
            {"method": {"type": "dora", "rank": 4}, "quantization": "nf4"},
        ],
        search={"algorithm": "grid"},
        scheduler={"type": "fifo"},
    )
    settings["trial"]["budget"] = {"steps": 6}
    result = tune(parse(StudyConfig, settings))
    assert result.counts == {"running": 0, "done": 4, "stopped": 0, "failed": 0}
    assert len(result.hosts) == 2
    registry = Registry(result.registry)
    bases = {name: registry.verify(f"tiny-{name}@1").base.quantization for name in ("lora", "qlora", "qdora")}
    assert bases == {"lora": "none", "qlora": "nf4", "qdora": "nf4"}


@pytest.mark.usefixtures("local_ray")
def test_dedicated_trials_that_were_stopped_early_still_leave_their_best_adapters(tiny_study: Make) -> None:
    methods = [
        {"type": "full", "extract_rank": 8},
        {"type": "galore", "rank": 8, "extract_rank": 8},
        {"type": "lisa", "num_layers": 1, "extract_rank": 8},
        {"type": "adalora", "initial_rank": 6, "target_rank": 4},
    ]
    settings = tiny_study(
        space=[{"method": method, "optim": {"learning_rate": 1e-6}} for method in methods],
        search={"algorithm": "grid"},
        scheduler={"type": "asha", "grace": 0.2, "reduction_factor": 4},
    )
    settings["trial"]["budget"] = {"steps": 400}
    settings["trial"]["eval"] |= {"every": 20}
    settings["trial"]["optim"] |= {"learning_rate": 1e-2}
    result = tune(parse(StudyConfig, settings))
    assert result.counts == {"running": 0, "done": 1, "stopped": 4, "failed": 0}
    by_method = {row.method: row for row in result.finalists}
    for name in ("full", "galore", "lisa", "adalora"):
        assert by_method[name].error is None
        assert by_method[name].published == (f"tiny-{name}@1",)
        servable = Registry(result.registry).verify(f"tiny-{name}@1").servable
        assert servable == ("rank pattern" if name == "adalora" else "extracted")


def test_ctrl_c_at_any_time_leaves_a_study_that_goes_on(tiny_study: Make, tmp_path: Path) -> None:
    settings = tiny_study(scheduler={"type": "fifo"}, search={"num_trials": 6}, hosts={"num_slots": 2})
    settings["trial"]["budget"] = {"steps": 60}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "rankloom.cli", "tune", str(tmp_path / "study.yaml")]
    environment = os.environ | {"PYTHONPATH": SOURCE}

    def interrupted(once: str, *options: str) -> str:
        """Run, and send what a terminal sends at Ctrl-C, to all processes, once the output has `once`."""
        log = tmp_path / "log"
        with log.open("w") as opened:
            driver = subprocess.Popen(
                [*command, *options], env=environment, stdout=opened, stderr=subprocess.STDOUT, start_new_session=True
            )
            deadline = time.monotonic() + 200
            while once not in log.read_text():
                assert driver.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            os.killpg(driver.pid, signal.SIGINT)
            assert driver.wait(timeout=90) == 130, log.read_text()
        assert "Traceback" not in log.read_text()
        return log.read_text()

    assert "connecting" in interrupted("connecting")  # nothing has begun
    assert "--resume continues from here" in interrupted(" done")  # trials are under way
    assert "--resume continues from here" in interrupted("on the test rows", "--resume")  # the best are being scored
    done = subprocess.run(
        [*command, "--resume", "--json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["counts"] == {"running": 0, "done": 6, "stopped": 0, "failed": 0}
    assert result["winner"]["published"][0] == "tiny@1"


FULL = """
import subprocess, sys
from pathlib import Path
from rankloom.cli import main

place, study = Path(sys.argv[1]), sys.argv[2]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)

def tune(*more):
    try:
        main(["tune", study, f"trial.output.root={place}/out", *more])
    except SystemExit as end:
        print(f"[exit {end.code}]", file=sys.stderr)

tune()
subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
tune("--resume")
"""


def may_mount() -> bool:
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="needs a mount namespace of its own")
def test_a_full_disk_interrupts_a_study_and_ends_no_trial(tiny_study: Make, tmp_path: Path) -> None:
    settings = tiny_study(scheduler={"type": "fifo"}, search={"num_trials": 6})
    file, place = tmp_path / "study.yaml", tmp_path / "small"
    file.write_text(yaml.safe_dump(settings))
    place.mkdir()
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", FULL, str(place), str(file)],
        env=os.environ | {"PYTHONPATH": SOURCE}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, _, second = done.stderr.partition("[exit 1]")
    assert "error: output.root: " in first
    assert "No space left on device; make room; --resume continues" in first
    for text in (done.stdout, done.stderr):
        assert "Traceback" not in text
        assert "died too often" not in text
    assert "[exit 0]" in second
    assert not re.search(r"^tiny-\d+ .* failed", done.stdout, re.MULTILINE)
    assert "winner   tiny-" in done.stdout
