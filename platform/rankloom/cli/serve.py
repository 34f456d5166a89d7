"""`rankloom serve`: adapters behind one endpoint."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from rankloom.cli.configs import find_config
from rankloom.cli.train import Json, Overrides
from rankloom.errors import ConfigError, RankloomError

if TYPE_CHECKING:
    from rankloom.config.serve import ReplicasConfig, ServeConfig

Deployment = Annotated[str, typer.Argument(help="A YAML file, or shipped:serve/banking77.yaml.", metavar="SERVE.yaml")]


def serve(
    config: Deployment,
    overrides: Overrides = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave it running on the cluster that RAY_ADDRESS names, and return.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve adapters over one base, on OpenAI's wire, until Ctrl-C.

    Requests that are under way when it ends are finished first.

    Examples:

    rankloom serve shipped:serve/banking77.yaml

    rankloom serve serve.yaml adapters=bank@champion,faq port=9000 replicas.max=4
    """

    from rankloom.config import load
    from rankloom.config.engine import VllmConfig
    from rankloom.config.serve import ServeConfig

    settings = load(ServeConfig, find_config(config), overrides or [])
    if detach and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError("--detach: a local Ray ends with this command; set RAY_ADDRESS to a cluster's address")
    if isinstance(settings.engine, VllmConfig) and not os.environ.get("RAY_ADDRESS"):
        from rankloom.engine.vllm.server import find_vllm

        find_vllm(settings.engine.python)
    if settings.auth.keys is not None:
        from rankloom.gateway.keys import KeyFile

        KeyFile(settings.auth.keys).list()  # a file that can't be read is told now, not with every request
    _run(settings, detach, as_json)


def _run(settings: ServeConfig, detach: bool, as_json: bool) -> None:
    from rankloom.deploy.app import PROXY, application, idle_gpus, on_idle_gpus, resolved
    from rankloom.launch.cluster import attached, open_ports
    from rankloom.paths import registry_root
    from rankloom.registry import Registry

    local = not os.environ.get("RAY_ADDRESS")
    port = settings.port or _free_port(settings.host)
    if local:
        if told := open_ports():
            raise ConfigError(told)
        _check_port(settings.host, port)
    settings = resolved(settings, Registry(settings.registry or registry_root()))
    os.environ.update(PROXY)  # where this starts Ray
    with attached() as nodes:
        from ray import serve as ray_serve

        num_gpus, given = int(sum(node.get("GPU", 0) for node in nodes)), settings.replicas.gpus
        idle = num_gpus if local else idle_gpus()  # a new Ray does not know at once
        settings = on_idle_gpus(settings, idle)
        for line in told_of_gpus(settings.replicas, idle, num_gpus, given=given is not None):
            typer.echo(line, err=True)
        if local:  # a cluster may grow
            _check_room(settings, nodes)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process
        ray_serve.start(http_options={"host": settings.host, "port": port})
        typer.echo("starting; the base is loaded first", err=True)
        try:
            ray_serve.run(application(settings), name=settings.name, route_prefix="/")
        except RuntimeError as error:
            reason = _why(settings.name) or str(error)
            ray_serve.delete(settings.name)
            raise RankloomError(f"the endpoint did not start: {reason}") from None
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{'127.0.0.1' if settings.host == '0.0.0.0' else shown}:{port}"
        typer.echo(_who_may_ask(settings), err=True)
        if not local:
            typer.echo(
                "the cluster's own ports run what whoever reaches them sends, unless it was started with "
                "RAY_AUTH_MODE=token", err=True,
            )  # fmt: skip
        typer.echo(json.dumps({"url": url, "name": settings.name}) if as_json else f"ready at {url}/v1")
        if detach:
            return
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        stopped.wait()
        typer.echo("stopping: what is under way is finished first", err=True)
        ray_serve.delete(settings.name)  # and no more: a cluster's Serve may have others, and a local Ray ends now


def told_of_gpus(replicas: ReplicasConfig, idle: int, num_gpus: int, *, given: bool) -> Iterator[str]:
    """What the replicas have, unless it was given, and what stands idle.

    Args:
        replicas: with its `gpus`.
        idle: GPUs that nobody has reserved, of `num_gpus`.
    """
    gpus = replicas.gpus or 0
    if not given:
        found = f"{idle} of {num_gpus} GPUs are idle" if num_gpus else "there is no GPU"
        yield f"replicas.gpus is not set: {gpus:g} for each replica; {found}"
    left = int(idle - gpus * replicas.max)
    if left > 0:
        use = "raise replicas.max" if gpus else "set replicas.gpus=1"
        yield f"{left} GPU(s) stand idle; {use} to use them"


def _who_may_ask(settings: ServeConfig) -> str:
    if settings.auth.keys is not None:
        return f"open to whoever has a key of {settings.auth.keys}, on host={settings.host}"
    if settings.auth.anonymous:
        return f"open to everybody who reaches host={settings.host}: auth.anonymous is set"
    return "open to this machine alone; for others: rankloom keys create, auth.keys and host"


def _check_room(settings: ServeConfig, nodes: Sequence[dict[str, float]]) -> None:
    """Ray Serve would wait for what never comes."""
    replicas = settings.replicas
    gpus = replicas.gpus or 0
    wanted = {"CPU": float(replicas.cpus), "GPU": gpus}
    room = sum(min(int(node.get(kind, 0) // each) for kind, each in wanted.items() if each) for node in nodes)
    if room < replicas.min:
        raise ConfigError(
            f"replicas.min={replicas.min}, each with {replicas.cpus} CPUs and {gpus:g} GPUs: this machine has "
            f"room for {room}; lower replicas.min, replicas.cpus or replicas.gpus, or set RAY_ADDRESS"
        )


def _why(name: str) -> str | None:
    """The last line of what Serve says of a deployment that failed."""
    from ray import serve as ray_serve

    status = ray_serve.status().applications.get(name)
    for deployment in status.deployments.values() if status else ():
        lines = [line for line in deployment.message.splitlines() if line.strip()]
        if lines and deployment.status.value != "HEALTHY":
            return re.sub(r"^rankloom\.errors\.\w+: ", "", lines[-1].strip())
    return None


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        return int(free.getsockname()[1])


def _check_port(host: str, port: int) -> None:
    """Ray Serve tells of a port in use only in its log."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ConfigError(f"host={host}, port={port}: {error.strerror}; choose another port, or port=0") from None
