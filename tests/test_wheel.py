"""The wheel holds the whole product: package, built-in data, shipped configs, jobs and the Serve application."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the editable wheel, built from this source tree."""
    folder = tmp_path_factory.mktemp("wheels")
    build = (
        "import sys\nfrom hatchling.builders.wheel import WheelBuilder\n"
        "print(*WheelBuilder('.').build(directory=sys.argv[1], versions=[sys.argv[2]]))"
    )
    made = {}
    for version in ("standard", "editable"):
        command = [sys.executable, "-c", build, str(folder / version), version]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
        made[version] = Path(done.stdout.split()[-1])
    return made


@pytest.fixture(scope="module")
def installed(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel alone; its dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*pip, str(wheels["standard"])], check=True)
    return folder


def run(installed: Path, cwd: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_all_of_the_source_tree(wheels: dict[str, Path]) -> None:
    packed = set(zipfile.ZipFile(wheels["standard"]).namelist())
    wanted = set()
    for source, target in (
        ("platform/rankloom", "rankloom"),
        ("configs", "rankloom/shipped/configs"),
        ("jobs", "rankloom/shipped/jobs"),
        ("serve", "rankloom/shipped/serve"),
    ):
        files = [p for p in (REPO / source).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert files, source
        wanted |= {f"{target}/{p.relative_to(REPO / source).as_posix()}" for p in files}
    assert wanted - packed == set()
    assert any(name.endswith("licenses/LICENSE") for name in packed)
    tops = sorted({name.split("/")[0] for name in packed})
    assert tops[0] == "rankloom"
    assert [top.endswith(".dist-info") for top in tops] == [False, True]


def test_editable_install_puts_nothing_beside_the_source(wheels: dict[str, Path]) -> None:
    names = zipfile.ZipFile(wheels["editable"]).namelist()
    assert [name for name in names if "dist-info" not in name] == ["_rankloom.pth"]


def test_cli_runs_a_shipped_config_by_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    find = (
        "import rankloom\nfrom rankloom.paths import find_shipped_folder\n"
        "from rankloom.config import TrialConfig, load\n"
        "print(rankloom.__file__, find_shipped_folder('configs'))\n"
        "print(load(TrialConfig, find_shipped_folder('configs') / 'trials' / 'lora.yaml').name)"
    )
    where, name = run(installed, tmp_path, "-c", find).splitlines()
    assert all(Path(path).is_relative_to(installed) for path in where.split())
    assert name == "bank-intents-lora"
    assert "train" in run(installed, tmp_path, str(installed / "bin" / "rankloom"), "--help")


def test_built_in_data_is_there(installed: Path, tmp_path: Path) -> None:
    count = (
        "from importlib.resources import files\n"
        "print(*(len(f.read_text().splitlines()) for f in sorted(\n"
        "    (files('rankloom') / 'data' / 'builtin' / 'bank-intents').glob('*.csv'))))"
    )
    assert all(int(lines) > 100 for lines in run(installed, tmp_path, "-c", count).split())


def test_serve_application_is_importable(installed: Path, tmp_path: Path) -> None:
    load = "from {} import build\nprint(type(build({{'base': 'builtin:smollm2'}})).__name__, build.__module__)\n"
    both = load.format("rankloom.deploy.app") + load.format("rankloom.shipped.serve.app")
    assert run(installed, tmp_path, "-c", both).split() == ["Application", "rankloom.deploy.app"] * 2


def test_jobs_say_how_they_are_used(installed: Path, tmp_path: Path) -> None:
    jobs = sorted((installed / "rankloom" / "shipped" / "jobs").glob("*.py"))
    assert jobs
    for job in jobs:
        assert f"rankloom {job.stem}" in run(installed, tmp_path, str(job), "--help")
