"""A deployment: one base, the adapters of a registry on it, and how requests find them.

Read `rankloom/gateway/policy.py` for what routes mean, `rankloom/deploy/app.py` for what is built of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rankloom.config.base import Frozen
from rankloom.config.engine import AnyEngineConfig, EngineConfig, VllmConfig
from rankloom.config.model import ModelConfig, Quantization
from rankloom.config.trial import AdapterName, Name
from rankloom.errors import ConfigError

REF_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,127}(@[a-z0-9][a-z0-9._-]{0,127})?$"
Ref = Annotated[str, Field(pattern=REF_PATTERN)]
"""`name`, `name@3`, `name@latest` or `name@alias`."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Share = Annotated[float, Field(gt=0, le=1)]


def _listed(value: Any) -> Any:
    if isinstance(value, str) and value != "all":
        return [ref.strip() for ref in value.split(",")]
    return value


def _model(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


class HeaderRule(Frozen):
    """Requests with a header of one value go to an adapter of their own."""

    header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")]
    """The header's name; upper and lower case are the same."""
    equals: str
    """Its whole value."""
    to: Ref
    """Where such a request goes; `base` is the base without an adapter."""


class JudgeConfig(Frozen):
    """When a canary is rolled back, or promoted, by itself: for what is the version's doing, not a client's."""

    min_requests: Annotated[int, Field(ge=1)] = 50
    """Requests that each of the two must have had, and how often each must have been timed, before it is compared."""
    error_margin: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Roll back when it failed in a share of its requests that is higher by more than this: it can't be loaded or
    verified, gives no sound logits, or fails or hangs on the endpoint's own requests, which the stable version answers.
    """
    latency_ratio: Annotated[float, Field(ge=1)] = 1.5
    """Roll back when its median time per generated token is longer by more than this factor. While the canary lasts,
    the endpoint times both on the same few tokens of its own, about as often as the candidate answers."""
    promote_after: Annotated[int, Field(ge=1)] | None = None
    """Promote it once it has answered so many requests and is not worse; null: leave that to a person."""


class CanaryConfig(Frozen):
    """A few requests go to a candidate version of an adapter.

    Both are aliases in the registry, which is where a canary begins and ends: `rankloom adapters promote bank@4 --alias
    canary` begins it, `rankloom adapters promote bank@4` promotes it. While both point to one version there is none.
    """

    adapter: AdapterName
    """The adapter's name."""
    stable: Name = "champion"
    """The alias that most requests go to."""
    candidate: Name = "canary"
    """The alias that is tried."""
    share: Share = 0.05
    """The candidate's share of the requests."""
    judge: JudgeConfig | None = JudgeConfig()
    """null: nothing happens by itself."""

    @model_validator(mode="after")
    def _two(self) -> CanaryConfig:
        if self.stable == self.candidate:
            raise ConfigError(f"stable and candidate are both {self.stable!r}; give two aliases")
        return self


class ShadowConfig(Frozen):
    """A copy of some requests goes to another adapter; its answer is measured and thrown away."""

    to: Ref
    """Who gets the copy."""
    share: Share = 1.0
    """The share of the requests that is copied."""


class RouteConfig(Frozen):
    """A model name that is decided for each request: `to`, `split` or `canary`, and what goes with it."""

    to: Ref | None = None
    """Every request goes here; `base` is the base without an adapter."""
    split: Annotated[dict[Ref, Annotated[float, Field(gt=0)]], Field(min_length=2)] | None = None
    """Several, by weight; the weights need not add up to 1."""
    canary: CanaryConfig | None = None
    """A stable version and a candidate."""
    rules: tuple[HeaderRule, ...] = ()
    """Looked at first; the first that fits decides."""
    sticky: bool = False
    """The same `user` of a request always gets the same of a split or canary."""
    fallback: tuple[Ref, ...] = ()
    """Tried in this order when the chosen adapter is missing or refused; `base` is the base."""
    shadow: ShadowConfig | None = None
    """Copy requests to another adapter."""

    @model_validator(mode="after")
    def _one_way(self) -> RouteConfig:
        given = [name for name in ("to", "split", "canary") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"give one of to, split and canary, not {' and '.join(given) or 'none'}")
        if self.sticky and self.to is not None:
            raise ConfigError("sticky needs a split or a canary; with `to` all requests go to the same")
        return self

    def refs(self) -> list[str]:
        """Every adapter that a request may go to."""
        ruled = [rule.to for rule in self.rules]
        one = [*([self.to] if self.to else []), *(self.split or ()), *([self.canary.adapter] if self.canary else [])]
        return [*one, *ruled, *self.fallback, *([self.shadow.to] if self.shadow else [])]


class LimitsConfig(Frozen):
    """What one request may ask for, and how many at once."""

    body_bytes: Annotated[int, Field(ge=1024)] = 2 * 2**20
    """The largest request body. Others wait less than 100 ms while one of 2 MiB is read, for a larger one longer."""
    context: Annotated[int, Field(ge=1)] | None = None
    """The most tokens of prompt and completion together; null: what the base has."""
    max_tokens: Annotated[int, Field(ge=1)] = 4096
    """The most tokens of one completion."""
    completions: Annotated[int, Field(ge=1)] = 16
    """The most completions of one request: prompts times `n`."""
    in_flight: Annotated[int, Field(ge=1)] = 512
    """Requests that are worked on or wait, over all replicas; beyond it the answer is 503 with Retry-After. One key may
    have as many of them as are left free for others, so half if it is alone; beyond it the answer is 429."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """The longest that one request may take."""


class ReplicasConfig(Frozen):
    """How many processes hold the base, and what each takes of the cluster."""

    min: Annotated[int, Field(ge=1)] = 1
    """Replicas that are always there."""
    max: Annotated[int, Field(ge=1)] = 1
    """With more than `min`, replicas come and go with the number of requests under way."""
    target_requests: Annotated[float, Field(gt=0)] = 8
    """Requests under way on one replica, above which another is started."""
    cpus: Annotated[int, Field(ge=1)] = 1
    """CPU cores of a replica, and its torch threads."""
    gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs of a replica; null: one of those that are idle when it is deployed, or an equal part of one where there are
    fewer than `max`; without any, replicas compute on CPUs."""

    def gpus_of(self, idle: int, engine: EngineConfig | VllmConfig) -> float:
        """`gpus`, or what null stands for.

        Args:
            idle: GPUs that nobody has reserved.
        """
        if self.gpus is not None:
            return self.gpus
        wanted = engine.num_gpus if isinstance(engine, VllmConfig) else 1
        if wanted > 1:
            return wanted if idle >= wanted else 0
        return 1e4 // -(-self.max // idle) / 1e4 if idle else 0  # Ray counts ten-thousandths

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasConfig:
        if self.max < self.min:
            raise ConfigError(f"max={self.max} is below min={self.min}")
        return self


class AuthConfig(Frozen):
    """Who may ask. Without `keys`, only this machine may, and may do everything."""

    keys: str | None = None
    """The file that `rankloom keys create` writes; every request then needs a key."""
    anonymous: bool = False
    """Answer everybody who can reach the port, without keys. Only this machine may load and unload adapters."""
    share_prefixes: bool = False
    """Keep what prompts begin with once for all keys: less to compute where they have a system prompt in common. But
    `cached_tokens` and the time to the first token then tell a key's holder what others' prompts begin with."""

    @model_validator(mode="after")
    def _one_of_two(self) -> AuthConfig:
        if self.keys is not None and self.anonymous:
            raise ConfigError(f"keys={self.keys!r} and anonymous exclude each other; leave one out")
        if self.share_prefixes and self.keys is None:
            raise ConfigError("share_prefixes is about keys, and there are none; leave it out, or set auth.keys")
        return self


class ServeConfig(Frozen):
    """Adapters over one base, behind one endpoint."""

    name: Name = "rankloom"
    """Names the Serve application."""
    adapters: Annotated[list[Ref] | Literal["all"], BeforeValidator(_listed)] = "all"
    """Refs such as `bank@champion`, separated by commas on a command line; a bare name offers all its versions. `all`:
    what the registry has for this base, also what is published later."""
    base: Annotated[ModelConfig, BeforeValidator(_model)] | None = None
    """The base model; null: what the first of `adapters` was tuned on."""
    quantization: Quantization | None = None
    """How the base's weights are held; null: as the first of `adapters` had it, else as they are."""
    registry: str | None = None
    """A folder or URL; null: `$RANKLOOM_REGISTRY`, else `~/rankloom/registry`."""
    routes: dict[AdapterName, RouteConfig] = {}
    """Model names that are decided for each request. A route hides an adapter of its name."""
    pinned: Annotated[list[Ref], BeforeValidator(_listed)] = []
    """Adapters that every replica loads at its start and keeps; aliases are followed."""
    engine: AnyEngineConfig = EngineConfig()
    """What computes: `bank`, rankloom's own, or `vllm`."""
    limits: LimitsConfig = LimitsConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    auth: AuthConfig = AuthConfig()
    host: str = "127.0.0.1"
    """Where `rankloom serve` listens. Beyond this machine it needs `auth.keys`, or `auth.anonymous`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0: a free one."""
    refresh_s: Annotated[float, Field(gt=0)] = 5.0
    """How often the registry is looked at for new versions and moved aliases."""

    @model_validator(mode="after")
    def _sound(self) -> ServeConfig:
        if self.adapters == "all" and self.base is None:
            raise ConfigError("adapters: all needs a base, for example base: builtin:smollm2; or list the adapters")
        if self.adapters == [] and self.base is None:
            raise ConfigError("adapters: without any, give a base, for example base: builtin:smollm2")
        if isinstance(self.engine, VllmConfig) and self.quantization is not None and self.quantization.type != "none":
            raise ConfigError(
                f"engine.type=vllm serves a base as it is stored, not with quantization {self.quantization.type}; "
                f"use engine.type=bank"
            )
        if self.host not in LOOPBACK and self.auth.keys is None and not self.auth.anonymous:
            raise ConfigError(
                f"host={self.host}: others could reach the endpoint; make a key with `rankloom keys create` and set "
                f"auth.keys, or set auth.anonymous=true to answer everybody"
            )
        return self
