"""Submit a command to a cluster as a Ray job over the cluster's HTTP API, and follow its log.

The job brings this package (`py_modules`) and the resolved config; the cluster needs rankloom's dependencies, not
rankloom. Files that its workers read and write must be reachable from there.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import yaml

import rankloom
from rankloom.config import CompareConfig, StudyConfig, TrialConfig, dump
from rankloom.errors import ConfigError, RankloomError
from rankloom.launch.cluster import CONNECT_TIMEOUT_S, check_answers

POLL_EVERY_S = 1.0
CONFIG_FILE = "config.yaml"
_FORWARDED = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "HF_ENDPOINT")
"""Environment variables that the job inherits: names of services. The cluster has its own keys and tokens."""


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    client: Any
    id: str
    address: str

    @property
    def hints(self) -> str:
        """The commands that follow and stop the job."""
        return (
            f"  follow it: ray job logs {self.id} --address {self.address} --follow\n"
            f"  stop it:   ray job stop {self.id} --address {self.address}"
        )


def submit(
    arguments: Sequence[str],
    *,
    address: str,
    config: TrialConfig | StudyConfig | CompareConfig | None = None,
    working_dir: Path | None = None,
) -> Job:
    """Start `rankloom <arguments>` on the cluster.

    Args:
        config: written as `config.yaml` into the job's working folder.
        working_dir: uploaded in place of `config`; give one of the two.

    Raises:
        RankloomError: the cluster can't be reached or refuses the job.
    """
    client = _connect(address)
    command = shlex.join(["python", "-m", "rankloom.cli", *arguments])
    environment = {name: os.environ[name] for name in _FORWARDED if name in os.environ}
    if "://" in os.environ.get("RANKLOOM_REGISTRY", ""):
        environment["RANKLOOM_REGISTRY"] = os.environ["RANKLOOM_REGISTRY"]
    with TemporaryDirectory(prefix="rankloom-") as scratch:
        if config is not None:
            (Path(scratch) / CONFIG_FILE).write_text(yaml.safe_dump(dump(config), sort_keys=False), encoding="utf-8")
        runtime_env = {
            "working_dir": str(working_dir or scratch),
            "py_modules": [str(Path(rankloom.__file__).parent)],
            "env_vars": environment,
        }
        try:
            job_id = client.submit_job(entrypoint=command, runtime_env=runtime_env)
        except Exception as error:  # RuntimeError with the server's text, or requests' own
            raise RankloomError(f"{address} refused the job: {_find_last_line(error)}") from None
    return Job(client, job_id, address)


def is_open(address: str) -> bool:
    """Return whether a cluster accepts jobs, and so code, without a token."""
    try:
        with urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=CONNECT_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):  # includes urllib's errors for 401 and 403
        return False


def follow(job: Job, write: Callable[[str], None]) -> int:
    """Print the job's log until it ends; return its exit code."""

    async def tail() -> None:
        async for lines in job.client.tail_job_logs(job.id):
            write(lines)

    try:
        asyncio.run(tail())
        while not (status := job.client.get_job_status(job.id)).is_terminal():
            time.sleep(POLL_EVERY_S)
        if status == "SUCCEEDED":
            return 0
        info = job.client.get_job_info(job.id)
    except (RuntimeError, OSError) as error:
        raise RankloomError(f"lost the connection to {job.address}: {_find_last_line(error)}\n{job.hints}") from None
    if status == "STOPPED":
        write(f"job {job.id} was stopped\n")
        return 130
    if info.driver_exit_code in (None, 0):
        write(f"job {job.id} failed: {info.message}\n")
    return info.driver_exit_code or 1


def _connect(address: str) -> Any:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--address {address}: expected the cluster's dashboard, for example http://head:8265")
    check_answers(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80), address)
    token = Path("~/.ray/auth_token").expanduser()
    if "RAY_AUTH_MODE" not in os.environ and ("RAY_AUTH_TOKEN" in os.environ or token.is_file()):
        os.environ["RAY_AUTH_MODE"] = "token"  # a cluster without authentication ignores it
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:  # ConnectionError, RuntimeError, ray's AuthenticationError, requests' own
        hint = ""
        if "auth" in str(error).lower():
            hint = "; set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        raise RankloomError(f"no Ray cluster takes jobs at {address}: {_find_last_line(error)}{hint}") from None


def _find_last_line(error: BaseException) -> str:
    """Return the last line of a server's traceback, which is the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__
