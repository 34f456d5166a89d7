"""The Serve application: an ingress that knows names, and replicas that hold the base. Read `gateway/gateway.py` first.

    serve run rankloom.deploy.app:build adapters=bank@champion registry=demo-output/registry

What an ingress needs to know is its `user_config`: Serve changes that in the running process, so that other routes,
adapters and limits end no connection. What a replica needs are its arguments: another base or engine makes new ones,
which take over while the old ones finish. (`serve deploy` makes all anew where `args` differ: serve/deploy.yaml.)
"""

from collections.abc import AsyncIterator
from typing import Any

import ray
from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from rankloom.config import dump, parse
from rankloom.config.engine import AutoEngineConfig, EngineConfig, VllmConfig
from rankloom.config.paths import resolve_paths
from rankloom.config.serve import ServeConfig
from rankloom.deploy.http_server import HttpServer
from rankloom.deploy.ingress import build_api
from rankloom.deploy.logs import log_with_serve
from rankloom.deploy.replica import Replica
from rankloom.deploy.router import AdapterRouter
from rankloom.engine.forward import Job, Progress
from rankloom.engine.jobs import ReplicaLostError
from rankloom.engine.protocol import Stats
from rankloom.engine.tokens import TokenizeJob, Tokens
from rankloom.engine.vllm.choice import choose_engine
from rankloom.errors import ConfigError, OverloadedError
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.replicas import Served
from rankloom.paths import get_registry_root
from rankloom.registry import Record, Registry

FOR_REPLICAS = ("base", "quantization", "registry", "engine", "pinned", "refresh_s")
"""The settings whose change makes new replicas."""
GRPC = {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"}
"""For callers of a deployment: over a connection of their own in place of Ray tasks, which take longer."""
PROXY = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "rankloom.deploy.proxy.build_middlewares"} | GRPC
"""For Serve's HTTP proxy."""
ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"} | GRPC
"""For our deployments: they never block, so they share Serve's event loop, which saves a change of thread per token."""
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""For a replica without a reserved GPU: Ray would leave all of the machine's visible."""
DRAIN_PERIOD_S = 0.5
"""Seconds that a stopping replica waits at least, until no router sends it requests any more; Serve's own are 2."""
ANSWER_S = 10.0
"""Seconds to wait for the answer of a replica that is replaced."""
LOGGING = {"enable_access_log": False}
"""The gateway logs every request, with more detail."""


class RayReplicas:
    """`gateway.Replicas` through a handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle.options(_by_reference=False)  # over gRPC, whatever the process that bound it does

    async def run(self, job: Job) -> AsyncIterator[Progress]:
        stream = self._handle.options(stream=True).run.remote(job)
        try:
            async for progress in stream:
                yield progress
        except Exception as error:
            raise _translate(error) from None
        finally:
            stream.cancel()

    async def describe(self) -> Served:
        served: Served = await self._call("describe")
        return served

    async def load(self, ref: str) -> None:
        await self._call("load", ref)

    async def tokenize(self, job: TokenizeJob) -> Tokens:
        tokens: Tokens = await self._call("tokenize", job)
        return tokens

    async def detokenize(self, tokens: tuple[int, ...]) -> str:
        return str(await self._call("detokenize", tokens))

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except Exception as error:
            raise _translate(error) from None


def _translate(error: Exception) -> Exception:
    """Return the error as the replica raised it, or the one that its loss means."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return error.cause
    if isinstance(error, (RayActorError, DeploymentUnavailableError, AioRpcError)):
        return ReplicaLostError("the replica was lost")
    if isinstance(error, BackPressureError):
        return OverloadedError("All replicas are full; try again later.")
    return error


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=100_000,
    logging_config=LOGGING,
    ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": ENVIRONMENT}},
)
@serve.ingress()
class Ingress:
    """The process that receives HTTP requests. It imports no torch."""

    def __init__(self, replicas: DeploymentHandle, address: tuple[str, int] | None = None) -> None:
        log_with_serve("rankloom.gateway")
        self._replicas = RayReplicas(replicas)
        self._gateway: Gateway | None = None
        self._server = None if address is None else HttpServer(build_api(self._wait_ready), *address)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serve calls it at the start, and when `user_config` has changed."""
        parsed = parse(ServeConfig, config, "serve")
        if self._gateway is None:
            gateway = Gateway(parsed, Registry(parsed.registry or get_registry_root()), self._replicas)
            await gateway.start()
            self._gateway = gateway
            if self._server is not None:
                self._server.start()
        else:
            await self._gateway.reconfigure(parsed)

    def __serve_build_asgi_app__(self) -> Any:
        return build_api(self._wait_ready)

    def _wait_ready(self) -> Gateway:
        assert self._gateway is not None  # Serve sends no request before `reconfigure` has returned
        return self._gateway

    async def finish(self) -> None:
        """Accept no more requests at its own address, and wait for those in flight."""
        if self._server is not None:
            await self._server.close()

    async def note(self, replica: str, stats: Stats, resident: int) -> None:
        """Record what a replica reports about itself."""
        if self._gateway is not None:
            self._gateway.metrics.record_replica(replica, stats, resident)


def build(args: dict[str, Any]) -> serve.Application:
    """Build the application for `serve run` and `serve deploy`; `args` are the keys of `ServeConfig`."""
    return build_application(parse(ServeConfig, args, "serve"))


def build_application(config: ServeConfig, address: tuple[str, int] | None = None) -> serve.Application:
    """Build the application of a config.

    Args:
        address: host and port where the ingress is to listen itself; None: Serve's HTTP proxies listen for it.

    Raises:
        ConfigError, AdapterNotFoundError, RegistryError: the adapters are not there, or of several bases.
    """
    config = resolve_paths(config)  # Serve's processes have a folder of their own
    registry = Registry(config.registry or get_registry_root())
    config = resolve_gpus(resolve_base(config, registry))
    config, engine, _ = resolve_engine(config, registry, on_gpu=bool(config.replicas.gpus))
    replicas, tree = config.replicas, dump(config)
    rows = engine.resolve_num_seqs(on_gpu=bool(replicas.gpus))
    scaling: dict[str, Any] = {"num_replicas": replicas.min}
    if replicas.max > replicas.min:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas.min,
                max_replicas=replicas.max,
                target_ongoing_requests=replicas.target_requests,
            )
        }
    replica = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=rows + engine.max_queue,
        graceful_shutdown_wait_loop_s=DRAIN_PERIOD_S,
        graceful_shutdown_timeout_s=config.limits.timeout_s,
        logging_config=LOGGING,
        ray_actor_options={
            "num_cpus": replicas.cpus,
            "num_gpus": replicas.gpus,
            "runtime_env": {"env_vars": ENVIRONMENT | ({} if replicas.gpus else NO_GPU)},
        },
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterRouter, request_router_kwargs={"room": rows}
        ),
        **scaling,
    ).bind({name: tree[name] for name in FOR_REPLICAS})
    return Ingress.options(  # type: ignore[attr-defined]
        user_config=tree,
        graceful_shutdown_wait_loop_s=DRAIN_PERIOD_S,
        graceful_shutdown_timeout_s=config.limits.timeout_s,
    ).bind(replica, address)


def resolve_base(config: ServeConfig, registry: Registry) -> ServeConfig:
    """Return the config with its base, which the adapters' records name where it does not."""
    records = {ref: registry.get(ref) for ref in config.adapters} if config.adapters != "all" else {}
    first_ref, first = next(iter(records.items()), (None, None))
    for ref, record in records.items():
        if first and _read_base(record) != _read_base(first):
            raise ConfigError(
                f"adapters: {ref} was tuned on {record.base.id} ({record.base.quantization}), but {first_ref} on "
                f"{first.base.id} ({first.base.quantization}); deploy them apart"
            )
    if config.base is not None or first is None:
        return config
    recorded = {"base": first.trial.get("model", first.base.id)}
    if config.quantization is None:
        recorded["quantization"] = first.trial.get("quantization", first.base.quantization)
    return parse(ServeConfig, dump(config) | recorded, f"the record of {first_ref}")


def resolve_engine(
    config: ServeConfig, registry: Registry, *, on_gpu: bool
) -> tuple[ServeConfig, EngineConfig | VllmConfig, str | None]:
    """Return the config with the engine that `auto` stands for, that engine's settings, and why it is that one.

    Args:
        config: with its base.
        on_gpu: whether the replicas have a GPU.
    """
    if not isinstance(config.engine, AutoEngineConfig):
        return config, config.engine, None
    engine, why = choose_engine(config.engine, on_gpu=on_gpu, obstacle=_find_obstacle_to_vllm(config, registry))
    return config.model_copy(update={"engine": engine}), engine, why


def _find_obstacle_to_vllm(config: ServeConfig, registry: Registry) -> str | None:
    assert isinstance(config.engine, AutoEngineConfig)
    if config.quantization is not None and config.quantization.type != "none":
        return f"vLLM serves a base as it is stored, not with quantization {config.quantization.type}"
    most = config.engine.vllm.max_lora_rank
    for record in map(registry.get, [] if config.adapters == "all" else config.adapters):
        if record.servable == "extracted":
            return f"{record.ref} was made by {record.method}, and vLLM serves LoRA and DoRA alone"
        rank = (record.trial.get("method") or {}).get("rank") or 0
        if rank > most:
            return f"{record.ref} is of rank {rank}, above engine.vllm.max_lora_rank={most}"
    return None


def resolve_gpus(config: ServeConfig, idle: int | None = None) -> ServeConfig:
    """Return the config with `replicas.gpus`, which stays what it is where an application is deployed again.

    Args:
        idle: unreserved GPUs; None: ask Ray.
    """
    if config.replicas.gpus is not None:
        return config
    gpus = _read_gpus(config.name)
    if gpus is None:
        gpus = config.replicas.count_gpus(count_idle_gpus() if idle is None else idle, config.engine)
    return config.model_copy(update={"replicas": config.replicas.model_copy(update={"gpus": gpus})})


def count_idle_gpus() -> int:
    """Return the cluster's unreserved GPUs; 0 where this process is not connected to one."""
    return int(ray.available_resources().get("GPU", 0)) if ray.is_initialized() else 0


def _read_gpus(name: str) -> float | None:
    """Return the GPUs of each replica of the application deployed under this name; None: there is none."""
    if not ray.is_initialized() or name not in serve.status().applications:
        return None
    try:
        gpus: float = serve.get_deployment_handle("Replica", name).gpus.remote().result(timeout_s=ANSWER_S)
    except Exception:  # another application, another version, or not running
        return None
    return gpus


def _read_base(record: Record) -> tuple[str, str]:
    return record.base.fingerprint, record.base.quantization
