"""Who gets a cluster's GPUs: on a local Ray that counts one, though torch finds none."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import ray
from ray import serve

from rankloom.deploy.app import build, idle_gpus
from rankloom.launch.cluster import worker_environment

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
    serve.shutdown()
    ray.shutdown()


@pytest.mark.usefixtures("one_gpu")
def test_a_worker_sees_the_gpus_that_it_has_reserved() -> None:
    def seen() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    for gpus, expected in ((0, ""), (0.5, "0"), (1, "0")):
        environment = {"env_vars": worker_environment(1, gpu=gpus > 0)}
        task = ray.remote(seen).options(num_gpus=gpus, num_cpus=0, runtime_env=environment)
        assert ray.get(task.remote()) == expected


@pytest.mark.usefixtures("one_gpu")
def test_replicas_take_idle_gpus_and_keep_them(
    tiny_model: Callable[..., Path], tmp_path: Path, processes_named: Callable[[str], list[int]]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    config = {"base": str(tiny_model("llama")), "registry": str(tmp_path), "limits": {"timeout_s": 5.0}}

    def deployed(**changed: Any) -> tuple[float, set[int]]:
        """GPUs of a replica, and which replicas there are."""
        serve.run(build(config | changed))
        body = {"model": config["base"], "prompt": "card lost", "max_tokens": 1}
        assert httpx2.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).status_code == 200
        gpus = serve.get_deployment_handle("Replica", "default").gpus.remote().result(timeout_s=60)
        return gpus, set(processes_named("ServeReplica:default:Replica"))

    gpus, before = deployed(name="default")
    assert (gpus, idle_gpus()) == (1, 0)
    gpus, before = deployed(name="default", limits={"timeout_s": 5.0, "max_tokens": 9})
    assert gpus == 1  # not none, for its own is taken
    gpus, after = deployed(name="default", replicas={"gpus": 0})
    assert (gpus, after & before) == (0, set())
    assert all(environment_of(pid)["CUDA_VISIBLE_DEVICES"] == "" for pid in after)


def environment_of(pid: int) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in pair)
