"""A deployment: one base, adapters from a registry, and the routes to them.

Read `rankloom/gateway/policy.py` for what routes do and `rankloom/deploy/app.py` for the application.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rankloom.config.base import Frozen
from rankloom.config.engine import AnyEngineConfig, AutoEngineConfig, EngineConfig, VllmConfig
from rankloom.config.model import AnyModel, Quantization
from rankloom.config.paths import IsPath
from rankloom.config.trial import AdapterName, Name
from rankloom.errors import ConfigError

REF_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,127}(@[a-z0-9][a-z0-9._-]{0,127})?$"
Ref = Annotated[str, Field(pattern=REF_PATTERN)]
"""`name`, `name@3`, `name@latest` or `name@alias`."""
ORIGIN_PATTERN = r"^(\*|https?://[^/\s,*]+)$"
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Fraction = Annotated[float, Field(gt=0, le=1)]


def _split_commas(value: Any) -> Any:
    if isinstance(value, str) and value != "all":
        return [ref.strip() for ref in value.split(",")]
    return value


class HeaderRule(Frozen):
    """Send requests with a certain header value to an adapter of their own."""

    header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")]
    """Name of the header; case is ignored."""
    equals: str
    """The value it must have, whole."""
    to: Ref
    """The adapter for such a request; `base` is the base without an adapter."""


class JudgeConfig(Frozen):
    """When a canary is rolled back or promoted automatically. Only failures of the version itself count."""

    min_requests: Annotated[int, Field(ge=1)] = 50
    """Requests that each version must have answered, and timings of each, before they are compared."""
    error_margin: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Roll back when the candidate's failure rate exceeds the stable version's by more than this. A failure: it can't
    be loaded or verified, gives logits that are not finite, or fails or hangs on the endpoint's own test requests."""
    latency_ratio: Annotated[float, Field(ge=1)] = 1.5
    """Roll back when the candidate's median time per token is this many times the stable version's. The endpoint
    times both on the same small request of its own, about as often as the candidate answers."""
    promote_after: Annotated[int, Field(ge=1)] | None = None
    """Promote the candidate after this many requests if it is not worse; null: leave promotion to a person."""


class CanaryConfig(Frozen):
    """Send a few requests to a candidate version of an adapter.

    Both versions are aliases in the registry, and moving an alias starts or ends a canary: `rankloom adapters promote
    bank@4 --alias canary` starts one, `rankloom adapters promote bank@4` promotes it. While both aliases point to the
    same version, there is no canary.
    """

    adapter: AdapterName
    """The adapter's name."""
    stable: Name = "champion"
    """Alias of the version that gets most requests."""
    candidate: Name = "canary"
    """Alias of the version to try."""
    share: Fraction = 0.05
    """Fraction of requests that go to the candidate."""
    judge: JudgeConfig | None = JudgeConfig()
    """When to roll back or promote; null: never automatically."""

    @model_validator(mode="after")
    def _check_aliases(self) -> CanaryConfig:
        if self.stable == self.candidate:
            raise ConfigError(f"stable and candidate are both {self.stable!r}; give two aliases")
        return self


class ShadowConfig(Frozen):
    """Copy some requests to another adapter; its answers are measured and discarded."""

    to: Ref
    """Adapter that gets the copies."""
    share: Fraction = 1.0
    """Fraction of requests to copy."""


class RouteConfig(Frozen):
    """A model name that is resolved for each request, through one of `to`, `split` and `canary`."""

    to: Ref | None = None
    """The adapter for every request; `base` is the base without an adapter."""
    split: Annotated[dict[Ref, Annotated[float, Field(gt=0)]], Field(min_length=2)] | None = None
    """Adapter -> weight; the weights need not add up to 1."""
    canary: CanaryConfig | None = None
    """A stable version and a candidate of one adapter."""
    rules: tuple[HeaderRule, ...] = ()
    """Checked first; the first rule that matches decides."""
    sticky: bool = False
    """Always send the same `user` to the same side of a split or canary."""
    fallback: tuple[Ref, ...] = ()
    """Adapters to try in this order when the chosen one is missing or refused; `base` is the base."""
    shadow: ShadowConfig | None = None
    """Copy requests to another adapter."""

    @model_validator(mode="after")
    def _check_one_target(self) -> RouteConfig:
        given = [name for name in ("to", "split", "canary") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"give one of to, split and canary, not {' and '.join(given) or 'none'}")
        if self.sticky and self.to is not None:
            raise ConfigError("sticky needs a split or a canary; with `to`, all requests go to one adapter")
        return self

    def list_refs(self) -> list[str]:
        """Return every adapter that a request may go to."""
        ruled = [rule.to for rule in self.rules]
        one = [*([self.to] if self.to else []), *(self.split or ()), *([self.canary.adapter] if self.canary else [])]
        return [*one, *ruled, *self.fallback, *([self.shadow.to] if self.shadow else [])]


class LimitsConfig(Frozen):
    """Limits on one request, and on the number of requests."""

    body_bytes: Annotated[int, Field(ge=1024)] = 2 * 2**20
    """Largest request body in bytes. Reading 2 MiB delays other requests by less than 100 ms, a larger one by more."""
    context: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of prompt and completion together; null: the base's context."""
    max_tokens: Annotated[int, Field(ge=1)] = 4096
    """Most tokens of one completion."""
    completions: Annotated[int, Field(ge=1)] = 16
    """Most completions of one request: prompts times `n`."""
    embeddings: Annotated[int, Field(ge=1)] = 2048
    """Most texts of one request for embeddings. They are computed a few at a time."""
    in_flight: Annotated[int, Field(ge=1)] = 512
    """Most requests running or waiting over all replicas; more get 503 with Retry-After. One key may have as many as it
    leaves free for others, so half when it is alone; more get 429."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that one request may take."""


class ReplicasConfig(Frozen):
    """How many processes hold the base, and the resources of each."""

    min: Annotated[int, Field(ge=1)] = 1
    """Replicas that always run."""
    max: Annotated[int, Field(ge=1)] = 1
    """Most replicas; above `min` they are started and stopped with the load."""
    target_requests: Annotated[float, Field(gt=0)] = 8
    """Requests per replica above which another replica is started."""
    cpus: Annotated[int, Field(ge=1)] = 1
    """CPU cores per replica, and its torch threads."""
    gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs per replica; null: one idle GPU each, or an equal share if fewer than `max` are idle at deployment; without
    an idle GPU, the CPU."""

    def count_gpus(self, idle: int, engine: EngineConfig | VllmConfig | AutoEngineConfig) -> float:
        """Return `gpus`, or the default that null stands for.

        Args:
            idle: GPUs that are not reserved.
        """
        if self.gpus is not None:
            return self.gpus
        vllm = engine.vllm if isinstance(engine, AutoEngineConfig) else engine
        wanted = vllm.num_gpus if isinstance(vllm, VllmConfig) else 1
        if wanted > 1:
            return wanted if idle >= wanted else 0
        return 1e4 // -(-self.max // idle) / 1e4 if idle else 0  # Ray counts ten-thousandths

    @model_validator(mode="after")
    def _check_range(self) -> ReplicasConfig:
        if self.max < self.min:
            raise ConfigError(f"max={self.max} is below min={self.min}")
        return self


class AuthConfig(Frozen):
    """Access to the endpoint. Without `keys`, only this machine may call it, and may do everything."""

    keys: Annotated[str, IsPath()] | None = None
    """File written by `rankloom keys create`; with it, every request needs a key."""
    anonymous: bool = False
    """Answer everyone who can reach the port, without keys. Only this machine may load, unload and promote
    adapters."""
    share_prefixes: bool = False
    """Share cached prompt prefixes between keys, which saves work when they have a system prompt in common. But then
    `cached_tokens` and the time to the first token reveal to one key how other keys' prompts begin."""

    cors_origins: Annotated[list[Annotated[str, Field(pattern=ORIGIN_PATTERN)]], BeforeValidator(_split_commas)] = []
    """Origins such as `https://chat.example.com` whose pages may call the endpoint from a browser; `*`: all of them,
    which needs `keys`. Without keys, such a page may do whatever its reader's machine may."""

    @model_validator(mode="after")
    def _check_keys(self) -> AuthConfig:
        if "*" in self.cors_origins and self.keys is None:
            raise ConfigError(
                "cors_origins=*: any page could call the endpoint, which has no keys; set auth.keys or list the origins"
            )
        if self.keys is not None and self.anonymous:
            raise ConfigError(f"keys={self.keys!r} and anonymous exclude each other; leave one out")
        if self.share_prefixes and self.keys is None:
            raise ConfigError("share_prefixes needs auth.keys, which is not set; remove it, or set auth.keys")
        return self


class ServeConfig(Frozen):
    """Adapters over one base, behind one endpoint."""

    name: Name = "rankloom"
    """Name of the Ray Serve application."""
    adapters: Annotated[list[Ref] | Literal["all"], BeforeValidator(_split_commas)] = "all"
    """References such as `bank@champion`, separated by commas on a command line; a bare name serves all its versions.
    `all`: every adapter in the registry for this base, including those published later."""
    base: AnyModel | None = None
    """The base model; null: the base of the first of `adapters`."""
    quantization: Quantization | None = None
    """Quantisation of the base; null: that of the first of `adapters`, else none."""
    registry: Annotated[str, IsPath()] | None = None
    """A folder or URL; null: `$RANKLOOM_REGISTRY`, else `~/rankloom/registry`."""
    routes: dict[AdapterName, RouteConfig] = {}
    """Model names that are resolved for each request. A route hides an adapter of the same name."""
    pinned: Annotated[list[Ref], BeforeValidator(_split_commas)] = []
    """Adapters that every replica loads at its start and never evicts; aliases are followed."""
    engine: AnyEngineConfig = EngineConfig()
    """The engine: `bank`, rankloom's own, `vllm`, or `auto`, which takes vLLM where it can on a GPU."""
    limits: LimitsConfig = LimitsConfig()
    """Limits on one request, and on the number of requests."""
    pooling: Literal["mean", "last", "cls"] = "mean"
    """How `/v1/embeddings` makes one vector of the last layer's hidden states: their mean over a text's tokens, that of
    its last token, or that of its first. Use what the base or the adapters were trained for. For vLLM it is in
    `engine.args`."""
    replicas: ReplicasConfig = ReplicasConfig()
    """How many processes hold the base, and the resources of each."""
    auth: AuthConfig = AuthConfig()
    """Access to the endpoint."""
    host: str = "127.0.0.1"
    """Address that `rankloom serve` listens on. Beyond this machine it needs `auth.keys` or `auth.anonymous`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0: any free port."""
    refresh_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between two looks at the registry for new versions and moved aliases."""

    @model_validator(mode="after")
    def _check_serve(self) -> ServeConfig:
        if self.adapters == "all" and self.base is None:
            raise ConfigError("adapters: all needs a base, for example base: builtin:smollm2; or list the adapters")
        if self.adapters == [] and self.base is None:
            raise ConfigError("adapters: without any, give a base, for example base: builtin:smollm2")
        if isinstance(self.engine, VllmConfig) and self.quantization is not None and self.quantization.type != "none":
            raise ConfigError(
                f"engine.type=vllm serves a base as it is stored, not with quantization {self.quantization.type}; "
                f"use engine.type=bank"
            )
        if isinstance(self.engine, VllmConfig) and self.pooling != type(self).model_fields["pooling"].default:
            raise ConfigError(
                f"pooling={self.pooling} is a setting of engine.type=bank; for vLLM add --pooler-config to engine.args"
            )
        if self.host not in LOOPBACK and self.auth.keys is None and not self.auth.anonymous:
            raise ConfigError(
                f"host={self.host}: others could reach the endpoint; make a key with `rankloom keys create` and set "
                f"auth.keys, or set auth.anonymous=true to answer everyone"
            )
        return self
