"""Who gets a cluster's GPUs: on a local Ray that counts one, though torch finds none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
from ray import serve

from rankloom.cli import main
from rankloom.deploy.app import count_idle_gpus
from rankloom.launch.cluster import make_worker_environment

pytestmark = pytest.mark.cluster
SOURCE = str(Path(__file__).resolve().parents[2] / "platform")


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[None]:
    source = {"PYTHONPATH": SOURCE, "CUDA_VISIBLE_DEVICES": "0"}  # as on a machine whose administrator set it
    ray.init(
        address="local", num_cpus=3, num_gpus=1, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": source},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.usefixtures("one_gpu")
def test_a_worker_sees_the_gpus_that_it_has_reserved() -> None:
    def seen() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    for gpus, expected in ((0, ""), (0.5, "0"), (1, "0")):
        environment = {"env_vars": make_worker_environment(1, gpu=gpus > 0)}
        task = ray.remote(seen).options(num_gpus=gpus, num_cpus=0, runtime_env=environment)
        assert ray.get(task.remote()) == expected


@pytest.mark.usefixtures("one_gpu")
def test_replicas_take_idle_gpus_and_keep_them_and_the_command_says_so(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    processes_named: Callable[[str], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["serve", str(tmp_path / "serve.yaml"), "port=0", "--detach"]
    (tmp_path / "serve.yaml").write_text(f"base: {tiny_model('llama')}\nregistry: {tmp_path}\n")
    monkeypatch.setenv("PYTHONPATH", SOURCE)
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)

    def run_apart() -> str:
        command = [sys.executable, "-m", "rankloom.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def run_here(*change: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([*arguments, *change])
        told = capsys.readouterr().err
        assert not exit_.value.code, told
        return told

    try:
        for run, idle, told in (
            (run_apart, 0, "replicas.gpus is not set: 1 for each replica; 1 of 1 GPUs are idle"),
            (partial(run_here, "replicas.gpus=0"), 1, "starting; the base is loaded first"),
            (run_here, 1, "1 GPU(s) stand idle; set replicas.gpus=1 to use them"),  # it has what it had
        ):
            assert told in run().splitlines()[:6]  # after three lines on memory
            assert count_idle_gpus() == idle
        pid = processes_named("ServeReplica:rankloom:Replica")[0]
        assert environment_of(pid)["CUDA_VISIBLE_DEVICES"] == ""
    finally:
        serve.shutdown()


def environment_of(pid: int) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in pair)
