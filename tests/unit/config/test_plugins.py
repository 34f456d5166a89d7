"""Methods of other packages: a real one is found, validated, trained and published; a broken one harms nobody else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rankloom.registry import Registry

REPO = Path(__file__).resolve().parents[3]
EXAMPLE = REPO / "examples" / "own_method"


def install(site: Path, name: str, entry_points: dict[str, str]) -> None:
    """What pip leaves of a package beside its modules."""
    info = site / f"{name.replace('-', '_')}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines = "".join(f"{key} = {value}\n" for key, value in entry_points.items())
    (info / "entry_points.txt").write_text(f"[rankloom.methods]\n{lines}")


def install_example(site: Path) -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    shutil.copytree(EXAMPLE / "lora_fa", site / "lora_fa")
    install(site, project["name"], project["entry-points"]["rankloom.methods"])


def run_python(code: str, site: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, in which the package is installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO / "platform"), str(site)])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


TRAIN = """
import json, sys
from lora_fa.config import LoraFaConfig  # first: its own import must not need rankloom to have found it
from rankloom.config import TrialConfig, parse
from rankloom.launch.trainer import train_trial
assert not {"torch", "lora_fa.method"} & set(sys.modules)
tree = json.loads(sys.argv[1]) if len(sys.argv) > 1 else json.loads(TREE)
assert "lora-fa" in json.dumps(TrialConfig.model_json_schema())
assert TrialConfig(name="t", method=LoraFaConfig(rank=4)).method.rank == 4
train_trial(parse(TrialConfig, tree))
"""


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=[pytest.mark.cluster, pytest.mark.slow])])
def test_a_method_of_another_package_trains_and_is_published(
    num_workers: int, tiny_llama: Path, tmp_path: Path
) -> None:
    install_example(tmp_path / "site")
    tree = {
        "name": "tiny",
        "model": {"id": str(tiny_llama)},
        "data": {"max_train_rows": 48},
        "method": {"type": "lora-fa", "rank": 4},
        "optim": {"learning_rate": 3e-3, "batch_size": 8},
        "budget": {"steps": 4},
        "eval": {"every": 2, "max_rows": 8, "max_test_rows": 8, "latency": False},
        "compute": {"num_workers": num_workers},
        "output": {"root": str(tmp_path / "root")},
    }
    done = run_python(f"TREE = {json.dumps(json.dumps(tree))}\n{TRAIN}", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    record = Registry(tmp_path / "root" / "registry").verify("tiny@1")
    assert (record.method, record.servable) == ("lora-fa", "itself")
    assert record.scorecard is not None
    both, b_alone = record.scorecard.adapter_bytes / 4, record.scorecard.trainable_parameters
    assert 0.2 * both < b_alone < 0.8 * both


PARSE = """
import warnings
from rankloom.config import TrialConfig, parse
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        print(parse(TrialConfig, {"name": "t", "method": {"type": "lora-fa", "rnk": 3}}))
    except ValueError as error:
        print(error)
print(*(each.message for each in caught), sep="\\n")
"""


def test_a_broken_package_is_named_and_left_out(tmp_path: Path) -> None:
    install_example(tmp_path)
    install(tmp_path, "broken-methods", {"gone": "no_such_module:Config", "odd": "pathlib:Path"})
    done = run_python(PARSE, tmp_path)
    assert done.returncode == 0, done.stderr
    error, *warned = done.stdout.splitlines()
    assert error == "config: method.rnk: unknown key; did you mean 'rank'?"
    assert warned[0].startswith("broken-methods: its method 'gone' is left out: ModuleNotFoundError")
    assert warned[1].startswith("broken-methods: its method 'odd' is left out: TypeError: expected a subclass")


def test_a_name_that_is_taken_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "thief.py").write_text(
        "from typing import ClassVar, Literal\n"
        "from rankloom.config.compatible import COMPATIBLE\n"
        "from rankloom.config.method import AdapterConfig\n"
        "class Mine(AdapterConfig):\n"
        "    type: Literal['adalora'] = 'adalora'\n"
        "    compatible: ClassVar = COMPATIBLE['adalora']\n"
        "    implementation: ClassVar = 'thief:Mine'\n"
    )
    install(tmp_path, "thief", {"adalora": "thief:Mine"})
    done = run_python(PARSE, tmp_path)
    assert "thief: its method's type 'adalora' is rankloom's already" in done.stdout + done.stderr
