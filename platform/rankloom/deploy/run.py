"""`serve`: an endpoint from its config to its end, on a Ray of its own or on one that runs already.

A Ray that was started for the endpoint ends with it; any other Ray stays, with its other applications.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rankloom.config import coerce
from rankloom.config.engine import AutoEngineConfig, VllmConfig
from rankloom.config.files import is_config_file
from rankloom.config.paths import resolve_paths
from rankloom.config.serve import ReplicasConfig, ServeConfig
from rankloom.errors import ConfigError, RankloomError
from rankloom.events import OnEvent, PhaseStarted
from rankloom.launch.cluster import attach, open_ports, starts_ray
from rankloom.paths import get_registry_root
from rankloom.registry import Registry

if TYPE_CHECKING:
    from openai import OpenAI


def serve(config: ServeConfig | str | Path | Mapping[str, Any], *, on_event: OnEvent = lambda _: None) -> Endpoint:
    """Serve adapters over one base on OpenAI's API; return when the endpoint is ready.

    It runs on the Ray cluster that `RAY_ADDRESS` names, else on the Ray that this process is connected to, else on a
    Ray of its own on this machine. Use it in a `with` block, or `close` it: requests in flight are finished first, and
    only a Ray of its own is stopped.

    Args:
        config: What to serve: a `ServeConfig`, a dict of the same settings, the path of a YAML file with them
            (`shipped:serve/quickstart.yaml` comes with rankloom), or one adapter such as `tickets@champion`.
        on_event: Called in this thread with phases and warnings while the endpoint starts.

    Returns:
        The endpoint: its `url`, and `client()`, an OpenAI client of it.

    Raises:
        ConfigError: A setting is wrong, the port is taken, or there is no room for the replicas.
        AdapterNotFoundError: The registry has no such adapter.
        RankloomError: The endpoint did not start; the message says why.

    Examples:
        >>> import rankloom as rl
        >>> with rl.serve(rl.ServeConfig(adapters=["tickets"], port=0)) as endpoint:
        ...     answer = endpoint.client().completions.create(model="tickets", prompt="my card was lost", max_tokens=4)
        >>> len(answer.choices)
        1
    """
    from rankloom.deploy.app import PROXY, resolve_base

    settings = _resolve_settings(config)
    settings = resolve_base(settings, Registry(settings.registry or get_registry_root()))
    own = starts_ray()
    if not os.environ.get("RAY_ADDRESS"):
        settings = _resolve_engine(settings, on_event)
    _check(settings, own=own)
    from rankloom.planning.endpoint import announce_endpoint  # imports torch: after the checks

    announce_endpoint(settings, on_event)
    with ExitStack() as stack:
        stack.enter_context(_set_environment(PROXY))  # where this starts Ray
        nodes = stack.enter_context(attach())
        forget_last_serve()
        url, started = _start(settings, nodes, on_event, own=own)
        ends_serve = started and not own and not os.environ.get("RAY_ADDRESS")
        endpoint = Endpoint(url, settings, listens=own, ends_serve=ends_serve)
        endpoint._held = stack.pop_all()
    return endpoint


class Endpoint:
    """A running endpoint, made by `serve`; leaving its `with` block closes it."""

    def __init__(self, url: str, config: ServeConfig, *, listens: bool, ends_serve: bool) -> None:
        self.url = url
        """Where it listens, without `/v1`; the console is there too."""
        self.config = config
        """Its settings, with the base."""
        self._listens = listens
        self._ends_serve = ends_serve
        self._held = ExitStack()
        self._open = True

    def client(self, api_key: str | None = None) -> OpenAI:
        """Return a client of the `openai` package for this endpoint.

        Args:
            api_key: A key that `rankloom keys create` made; needed where `auth.keys` is set.
        """
        if api_key is None and self.config.auth.keys is not None:
            raise ConfigError(
                f"this endpoint asks for a key of {self.config.auth.keys}: make one with `rankloom keys create NAME`, "
                f"and give it as client(api_key=...)"
            )
        try:
            from openai import OpenAI
        except ImportError:
            raise RankloomError("client() needs the openai package: pip install openai") from None
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key or "none")

    def close(self) -> None:
        """Finish the requests in flight, and end the endpoint; more than once does nothing."""
        if not self._open:
            return
        self._open = False
        from ray import serve as ray_serve

        with self._held:
            if self._listens:
                self._finish_requests()
            ray_serve.delete(self.config.name)  # a cluster's Serve may have other applications
            if self._ends_serve and not ray_serve.status().applications:
                ray_serve.shutdown()

    def _finish_requests(self) -> None:
        from ray import serve as ray_serve
        from ray.exceptions import RayError

        with suppress(RayError, TimeoutError):  # it ends all the same
            ray_serve.get_app_handle(self.config.name).finish.remote().result(timeout_s=self.config.limits.timeout_s)

    def detach(self) -> None:
        """Let it run on its cluster, and disconnect from that."""
        self._open = False
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Endpoint({self.url}{'' if self._open else ', closed'})"

    def _repr_html_(self) -> str:
        state = "serves" if self._open else "has served"
        return f'Endpoint <a href="{self.url}">{self.url}</a> {state} {self.config.name}'


def explain_gpus(replicas: ReplicasConfig, idle: int, num_gpus: int, *, given: bool) -> Iterator[str]:
    """Yield what the replicas have, unless it was given, and what stands idle.

    Args:
        replicas: with its `gpus`.
        idle: GPUs that are not reserved, of `num_gpus`.
    """
    gpus = replicas.gpus or 0
    if not given:
        found = f"{idle} of {num_gpus} GPUs are idle" if num_gpus else "there is no GPU"
        yield f"replicas.gpus is not set: {gpus:g} for each replica; {found}"
    left = int(idle - gpus * replicas.max)
    if left > 0:
        use = "raise replicas.max" if gpus else "set replicas.gpus=1"
        yield f"{left} GPU(s) stand idle; {use} to use them"


def _resolve_settings(config: ServeConfig | str | Path | Mapping[str, Any]) -> ServeConfig:
    """Return the settings with local places absolute: Serve's processes have a folder and a home of their own."""
    if isinstance(config, str) and not is_config_file(config):
        settings = ServeConfig(adapters=[config])
    else:
        settings = coerce(ServeConfig, config)
    registry = settings.registry or get_registry_root()
    return resolve_paths(settings.model_copy(update={"registry": registry}))


def _resolve_engine(settings: ServeConfig, on_event: OnEvent) -> ServeConfig:
    """Return the settings with an engine in the place of `auto`, and say which.

    Before `replicas.gpus` is resolved, this machine's GPUs count.
    """
    if not isinstance(settings.engine, AutoEngineConfig):
        return settings
    from rankloom.deploy.app import resolve_engine
    from rankloom.models.device import choose_device

    gpus, registry = settings.replicas.gpus, Registry(settings.registry or get_registry_root())
    on_gpu = choose_device("auto").type == "cuda" if gpus is None else gpus > 0
    settings, _, why = resolve_engine(settings, registry, on_gpu=on_gpu)
    on_event(PhaseStarted("plan", f"engine  {why}"))
    return settings


def _check(settings: ServeConfig, *, own: bool) -> None:
    """Refuse what can't work before anything starts."""
    if isinstance(settings.engine, VllmConfig) and not os.environ.get("RAY_ADDRESS"):
        from rankloom.engine.vllm.server import find_vllm

        find_vllm(settings.engine.python)
    if settings.auth.keys is not None:
        from rankloom.gateway.keys import KeyFile

        KeyFile(settings.auth.keys).list()  # else every request would fail at a file that can't be read
    if own:
        if reason := open_ports():
            raise ConfigError(reason)
        _check_port(settings.host, settings.port)


def _start(
    settings: ServeConfig, nodes: Sequence[dict[str, float]], on_event: OnEvent, *, own: bool
) -> tuple[str, bool]:
    """Deploy the application; return its URL, and whether Serve was started for it."""
    from ray import serve as ray_serve

    from rankloom.deploy.app import build_application, count_idle_gpus, resolve_gpus

    def tell(message: str) -> None:
        on_event(PhaseStarted("serve", message))

    num_gpus, given = int(sum(node.get("GPU", 0) for node in nodes)), settings.replicas.gpus
    idle = num_gpus if own else count_idle_gpus()  # a new Ray does not know at once
    settings = _resolve_engine(resolve_gpus(settings, idle), on_event)
    for note in explain_gpus(settings.replicas, idle, num_gpus, given=given is not None):
        tell(note)
    if own:  # a cluster may grow
        _check_room(settings, nodes)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process
    started, address = not ray_serve.status().proxies, None
    if started:
        host, port = settings.host, settings.port or _find_free_port(settings.host)
        if own:
            address = host, port
            ray_serve.start(proxy_location="Disabled")
        else:
            ray_serve.start(http_options={"host": host, "port": port})
    tell("starting; the base is loaded first")
    try:
        ray_serve.run(build_application(settings, address), name=settings.name, route_prefix="/")
    except RuntimeError as error:
        reason = _find_reason(settings.name) or str(error)
        ray_serve.delete(settings.name)
        raise RankloomError(f"the endpoint did not start: {reason}") from None
    tell(_describe_access(settings))
    if os.environ.get("RAY_ADDRESS"):
        tell(
            "the cluster's own ports run what whoever reaches them sends, unless it was started with "
            "RAY_AUTH_MODE=token"
        )
    return _make_url(*(address or _read_address())), started


def forget_last_serve() -> None:
    """Drop Serve's handle of a controller that is gone.

    Serve tells this process's Rays apart by the id of its job, which is the same in each Ray that this process starts.
    """
    from ray.serve.context import _check_cached_client_alive

    _check_cached_client_alive()


def _read_address() -> tuple[str, int]:
    """Return where Serve's proxies listen, also where it ran before with another host and port than ours."""
    from ray.serve.context import _get_global_client

    options = _get_global_client().get_serve_details()["http_options"]
    return options["host"], options["port"]


def _make_url(host: str, port: int) -> str:
    host = "127.0.0.1" if host == "0.0.0.0" else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _describe_access(settings: ServeConfig) -> str:
    if settings.auth.keys is not None:
        return f"open to whoever has a key of {settings.auth.keys}, on host={settings.host}"
    if settings.auth.anonymous:
        return f"open to everybody who reaches host={settings.host}: auth.anonymous is set"
    return "open to this machine alone; for others: rankloom keys create, auth.keys and host"


def _check_room(settings: ServeConfig, nodes: Sequence[dict[str, float]]) -> None:
    """Raise where Ray Serve would wait for room that never comes."""
    replicas = settings.replicas
    gpus = replicas.gpus or 0
    wanted = {"CPU": float(replicas.cpus), "GPU": gpus}
    room = sum(min(int(node.get(kind, 0) // each) for kind, each in wanted.items() if each) for node in nodes)
    if room < replicas.min:
        raise ConfigError(
            f"replicas.min={replicas.min}, each with {replicas.cpus} CPUs and {gpus:g} GPUs: this machine has "
            f"room for {room}; lower replicas.min, replicas.cpus or replicas.gpus, or set RAY_ADDRESS"
        )


def _find_reason(name: str) -> str | None:
    """Return the last line of what Serve says of a deployment that failed."""
    from ray import serve as ray_serve

    status = ray_serve.status().applications.get(name)
    for deployment in status.deployments.values() if status else ():
        lines = [line for line in deployment.message.splitlines() if line.strip()]
        if lines and deployment.status.value != "HEALTHY":
            return re.sub(r"^rankloom\.errors\.\w+: ", "", lines[-1].strip())
    return None


def _find_free_port(host: str) -> int:
    with socket.create_server((host, 0), family=_choose_family(host)) as free:
        return int(free.getsockname()[1])


def _check_port(host: str, port: int) -> None:
    """Raise where the port is taken: Ray Serve writes that into its log alone."""
    try:
        socket.create_server((host, port), family=_choose_family(host)).close()
    except OSError as error:
        raise ConfigError(f"host={host}, port={port}: {error.strerror}; choose another port, or port=0") from None


def _choose_family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@contextmanager
def _set_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have these variables in this process's environment, which the processes of a Ray that it starts inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
