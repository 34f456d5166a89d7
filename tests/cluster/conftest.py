"""Real local Rays, two at a time: one for the tests that share a Serve, one for the others.

Each half has its own folder for Ray, where Train's helpers look for the cluster to attach to.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCE = str(Path(__file__).resolve().parents[2] / "platform")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["RAY_TMPDIR"] = f"/tmp/ray-{worker}"  # not pytest's, because sockets need short paths


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that share a Serve first, then those that share a Ray: each starts once, in a half of its own."""
    needs: dict[Path, set[str]] = {}
    for item in items:
        needs.setdefault(item.path, set()).update(getattr(item, "fixturenames", ()))
    items.sort(key=lambda item: ("local_serve" not in needs[item.path], "local_ray" not in needs[item.path]))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("serve" if "local_serve" in needs[item.path] else "ray"))


@pytest.fixture(scope="module")
def local_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """Connect this process to its own Ray, which lives on where the next test wants it too: a start takes seconds."""
    import ray

    source = {"PYTHONPATH": SOURCE}  # in case rankloom is not installed
    if not ray.is_initialized():
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": source}
        )
    yield
    if not is_used_next("local_ray", request):
        ray.shutdown()


@pytest.fixture(scope="module")
def local_serve(local_ray: None, request: pytest.FixtureRequest) -> Iterator[str]:  # noqa: ARG001
    """Start Ray Serve, which lives on as its Ray does, and yield its URL; tests share its controller and proxy."""
    from ray import serve

    from rankloom.deploy.run import _make_url, _read_address, forget_last_serve

    forget_last_serve()
    if not serve.status().proxies:
        serve.start(http_options={"host": "127.0.0.1", "port": free_ports(1)[0]})
    yield _make_url(*_read_address())
    if not is_used_next("local_serve", request):
        serve.shutdown()


def is_used_next(fixture: str, request: pytest.FixtureRequest) -> bool:
    """Return whether the test after the last one of this module uses a fixture too."""
    items: list[Any] = request.session.items
    last = max(number for number, item in enumerate(items) if item.path == request.path)
    following = items[last + 1 : last + 2]
    return any(fixture in item.fixturenames and _find_half(item) == _find_half(items[last]) for item in following)


def _find_half(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    assert mark is not None
    return str(mark.args[0])


@pytest.fixture
def processes_named() -> Callable[[str], list[int]]:
    """Return a function that finds this process's descendants, Ray's processes, by a part of their name."""
    return lambda name: processes_below(os.getpid(), name)


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a cluster that takes jobs and yield its HTTP address; this process does not connect to it."""
    ports = free_ports(3)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), environment["PATH"]]
    )  # a job runs `python`
    environment.pop("RAY_ADDRESS", None)
    environment.pop("PYTHONPATH", None)  # the jobs must bring rankloom
    # its own folder, so that other Rays do not find it; not pytest's, because sockets need short paths
    temporary = tempfile.mkdtemp(prefix="ray-")
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=2", "--block",
        "--disable-usage-stats", "--include-dashboard=true", "--node-ip-address=127.0.0.1",
        f"--port={ports[0]}", f"--dashboard-port={ports[1]}",
        f"--dashboard-agent-listen-port={ports[2]}", f"--temp-dir={temporary}",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("ray") / "start.log"
    with log.open("w") as opened:
        head = subprocess.Popen(
            command, env=environment, stdout=opened, stderr=subprocess.STDOUT, cwd=log.parent, start_new_session=True
        )
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        wait_for_jobs_api(address, head, log)
        yield address
    finally:
        end_session(head.pid)
        head.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def end_session(session: int) -> None:
    """Kill every process that the head started, jobs too; `ray stop` would also stop other Rays."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session:
                    os.kill(int(folder.name), signal.SIGKILL)
            except (OSError, ProcessLookupError):
                continue  # it ended meanwhile


def processes_below(pid: int, name: str) -> list[int]:
    """Return the descendants of `pid` with `name` in their command line."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat, names[int(folder.name)] = (folder / "stat").read_text(), (folder / "cmdline").read_text()
            except OSError:
                continue  # it ended meanwhile
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])

    def below(child: int) -> bool:
        return child == pid or (child in parents and below(parents[child]))

    return [child for child, text in names.items() if name in text and below(child)]


def wait_for_jobs_api(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    import time
    import urllib.request

    deadline = time.monotonic() + 120
    asked = urllib.request.Request(
        f"{address}/api/jobs/", headers={"authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    )
    while True:
        try:
            urllib.request.urlopen(asked, timeout=5).close()
            return
        except OSError:
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    opened = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in opened]
    for each in opened:
        each.close()
    return ports


@pytest.fixture
def tiny_trial(tmp_path: Path, tiny_llama: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a trial's settings: a tiny model, 96 rows of two intents; keywords set sections."""
    texts = {"card_lost": "my card was lost", "transfer": "transfer money to a friend"}
    rows = [f"{text} {i},{label}" for i in range(48) for label, text in texts.items()]
    data = tmp_path / "rows.csv"
    data.write_text("\n".join(["text,label", *rows]) + "\n")

    def make(**changed: Any) -> dict[str, Any]:
        return {
            "name": "tiny",
            "model": {"id": str(tiny_llama)},
            "method": {"type": "lora"},
            "data": {"train": str(data), "max_length": 64},
            "optim": {"batch_size": 4},
            "budget": {"steps": 12},
            "eval": {"every": 4, "latency": False, "max_rows": 8, "max_test_rows": 8},
            "compute": {"num_workers": 1, "device": "cpu", "cpus_per_worker": 1},
            "output": {"root": str(tmp_path / "out")},
        } | changed

    return make


@pytest.fixture
def tiny_study(tiny_trial: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a study's settings over a tiny model; keywords replace whole sections."""
    trial = tiny_trial(
        budget={"steps": 27},
        eval={"every": 3, "latency": False, "max_rows": 16, "max_test_rows": 16, "batch_size": 16},
        compute={"device": "cpu", "cpus_per_worker": 1},
    )
    del trial["name"]

    def make(**changed: Any) -> dict[str, Any]:
        return {
            "name": "tiny",
            "trial": trial,
            "space": [
                {
                    "method": {"type": "lora", "rank": {"choice": [2, 4]}, "alpha_over_rank": {"choice": [1, 2]}},
                    "optim": {"learning_rate": {"loguniform": [1e-5, 1e-2]}},
                },
                {"method": {"type": "dora", "rank": 4}, "optim": {"learning_rate": {"loguniform": [1e-5, 1e-2]}}},
            ],
            "search": {"num_trials": 12},
            "scheduler": {"type": "asha", "grace": 0.12},
            "hosts": {"num_slots": 4, "max_failures": 3, "checkpoint_every_s": 0},
            "final": {"top_k": 2},
        } | changed

    return make
