"""Which cluster, and how it is divided among workers; nothing here starts Ray."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankloom.cli import main
from rankloom.config.engine import VllmConfig
from rankloom.config.trial import ComputeConfig
from rankloom.engine.vllm.server import make_environment as vllm_environment
from rankloom.errors import ConfigError, RankloomError
from rankloom.events import Event
from rankloom.launch.cluster import (
    WorkerResources,
    announce,
    connect,
    divide_resources,
    make_worker_environment,
    open_ports,
)
from rankloom.launch.submit import is_open


@pytest.mark.parametrize(
    ("compute", "nodes", "expected"),
    [
        ({"num_workers": 1}, [{"CPU": 2}], WorkerResources(1, 2, False)),
        ({"num_workers": 2}, [{"CPU": 7}], WorkerResources(2, 3, False)),
        ({"num_workers": 3}, [{"CPU": 8}, {"CPU": 4}], WorkerResources(3, 4, False)),
        ({"num_workers": 2}, [{"CPU": 4}, {"CPU": 1}], WorkerResources(2, 2, False)),
        ({"num_workers": 2, "cpus_per_worker": 1}, [{"CPU": 8}], WorkerResources(2, 1, False)),
        ({"num_workers": 2}, [{"CPU": 8, "GPU": 2}], WorkerResources(2, 1, True)),
        ({"num_workers": 1, "device": "cpu"}, [{"CPU": 8, "GPU": 2}], WorkerResources(1, 8, False)),
    ],
)
def test_workers_get_an_even_share(
    compute: dict[str, Any], nodes: list[dict[str, float]], expected: WorkerResources
) -> None:
    assert divide_resources(ComputeConfig(**compute), nodes, growing=False) == expected


@pytest.mark.parametrize(
    ("compute", "nodes", "message"),
    [
        ({"num_workers": 3}, [{"CPU": 2}], "room for 2"),
        ({"num_workers": 2, "cpus_per_worker": 2}, [{"CPU": 3}], "room for 1"),
        ({"num_workers": 2}, [{"CPU": 8, "GPU": 1}], "room for 1"),
        ({"num_workers": 1, "device": "cuda"}, [{"CPU": 8}], "no GPU"),
    ],
)
def test_what_does_not_fit_is_refused_unless_the_cluster_grows(
    compute: dict[str, Any], nodes: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        divide_resources(ComputeConfig(**compute), nodes, growing=False)
    assert divide_resources(ComputeConfig(**compute), nodes, growing=True).num_workers == compute["num_workers"]


def test_cudnns_attention_is_off_in_workers_and_in_vllm() -> None:
    for environment in (make_worker_environment(1, gpu=True), vllm_environment(VllmConfig(), threads=1)):
        assert environment["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == "1"
    assert vllm_environment(VllmConfig(env={"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}), threads=1) != environment


def test_torchs_compiler_stays_with_vllm_and_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    assert make_worker_environment(1, gpu=False)["TORCHDYNAMO_DISABLE"] == "1"
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    assert make_worker_environment(1, gpu=False)["TORCHDYNAMO_DISABLE"] == "0"
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # a replica's
    assert "TORCHDYNAMO_DISABLE" not in vllm_environment(VllmConfig(), threads=1)


def test_a_cluster_that_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with (
        pytest.raises(RankloomError, match=r"nothing answers at RAY_ADDRESS=127\.0\.0\.1:9"),
        connect(ComputeConfig()),
    ):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigError, match="rankloom submit"), connect(ComputeConfig()):
        pass


def test_open_ports_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, kinds in (("token", ["phase"]), ("disabled", ["phase", "warning"])):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        told: list[Event] = []
        announce(told.append)
        assert [event.kind for event in told] == kinds


def test_serve_starts_no_ray_that_runs_what_anybody_sends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_ports() is None
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert open_ports() is None  # Ray makes a token by itself
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = tmp_path / "serve.yaml"
    config.write_text(f"base: org/base\nregistry: {tmp_path / 'registry'}\nport: 0\n")
    with pytest.raises(SystemExit) as caught:
        main(["serve", str(config)])
    assert caught.value.code == 2
    assert "error: RAY_AUTH_MODE=disabled: Ray's ports listen beyond this machine" in capsys.readouterr().err


def test_nothing_of_ours_turns_rays_tokens_off() -> None:
    root = Path(__file__).resolve().parents[3]
    files = [root / "Makefile", root / "README.md", *root.glob("configs/**/*"), *root.glob("benchmarks/*.py")]
    files += [*root.glob("jobs/*"), *root.glob("serve/*"), root / "tests" / "conftest.py"]
    told = [file for file in files if file.is_file() and "RAY_AUTH_MODE" in file.read_text()]
    assert [file.name for file in told if "disabled" in file.read_text()] == []


@pytest.mark.parametrize(("status", "expected"), [(200, True), (401, False), (403, False), (404, False)])
def test_submit_sees_whether_a_cluster_asks_for_a_token(status: int, expected: bool) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        log_message: Callable[..., None] = lambda *_: None

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert is_open(f"http://127.0.0.1:{server.server_port}/") is expected
        server.shutdown()
    assert not is_open("http://127.0.0.1:9")
