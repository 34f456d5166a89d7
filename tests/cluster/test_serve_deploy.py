"""`serve deploy` as an operator uses it, on a cluster that `ray start` made: changes, and replicas that come and go."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import yaml
from openai import OpenAI
from test_serve_app import PROMPT, SOURCE, free_port, publish

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@contextmanager
def load(url: str, models: list[str], clients: int) -> Iterator[list[str]]:
    """Clients that ask one request after the other for as long as this lasts; what failed."""
    failures: list[str] = []
    done = threading.Event()

    def ask(number: int) -> None:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        while not done.is_set():
            try:
                client.completions.create(
                    model=models[number % len(models)], prompt=PROMPT, max_tokens=100, extra_body={"ignore_eos": True}
                )
            except openai.APIError as error:
                failures.append(str(error))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        done.set()
        for thread in threads:
            thread.join(90)


def replicas(url: str) -> set[str]:
    """Names of the replicas that the ingress heard of lately."""
    return set(
        re.findall(r'^rankloom_replica_running{replica="(.*?)"}', httpx2.get(f"{url}/metrics", timeout=60).text, re.M)
    )


def until(condition: Callable[[], Any], timeout_s: float = 120) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found


def test_deployments_change_under_load_without_a_failure(
    dashboard: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base, registry, port = tiny_model("llama"), tmp_path / "registry", free_port()
    for seed, name in enumerate(("first", "second")):
        publish(registry, base, name, tmp_path / "adapters", seed=seed)
    url = f"http://127.0.0.1:{port}"
    args: dict[str, Any] = {
        "base": str(base),
        "registry": str(registry),
        "refresh_s": 0.5,
        "limits": {"max_tokens": 300},
        "engine": {"max_num_seqs": 4, "kv_cache_tokens": 4096},
    }

    def deploy(faq: str, **changed: Any) -> None:
        """As an operator: a file, and Serve's own command. The route `faq` goes to an adapter."""
        ingress = args | changed | {"routes": {"faq": {"to": faq}}}
        application = {
            "name": "rankloom",
            "route_prefix": "/",
            "import_path": "rankloom.deploy.app:build",
            "runtime_env": {"env_vars": {"PYTHONPATH": SOURCE}},
            "args": args | changed,
            "deployments": [{"name": "Ingress", "user_config": ingress}],
        }
        file = tmp_path / "deploy.yaml"
        http = {"host": "127.0.0.1", "port": port}
        file.write_text(yaml.safe_dump({"http_options": http, "applications": [application]}))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", "-a", dashboard, str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def ready() -> bool:
        try:
            return httpx2.get(f"{url}/readyz", timeout=60).status_code == 200
        except httpx2.HTTPError:
            return False

    def adapter_of(model: str) -> str:
        answer = httpx2.post(
            f"{url}/v1/completions", json={"model": model, "prompt": PROMPT, "max_tokens": 1}, timeout=60
        )
        return answer.headers["x-rankloom-adapter"]

    deploy("first")
    until(ready)
    assert adapter_of("faq") == "first"
    [before] = until(lambda: replicas(url))
    models = ["faq", "second", str(base)]
    with load(url, models, 3) as failures:
        deploy("second")  # in the running processes
        until(lambda: adapter_of("faq") == "second")
        assert replicas(url) == {before}
        deploy("second", engine={"max_num_seqs": 8, "kv_cache_tokens": 4096})  # others take over
        until(lambda: (now := replicas(url)) and before not in now)
        assert adapter_of("faq") == "second"
        assert failures == []

    deploy("second", replicas={"min": 1, "max": 2, "target_requests": 2})
    until(ready)
    with load(url, models, 12) as failures:
        until(lambda: len(replicas(url)) == 2, 240)
        assert failures == []
