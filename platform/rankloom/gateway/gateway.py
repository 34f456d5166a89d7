"""The endpoint's request path: names, limits, retries, fallbacks, canaries, metrics. It knows neither HTTP nor Ray.

`begin` decides where a request goes and waits for its first tokens, so that errors are known before a response starts;
the caller then reads the `InFlightRequest` to its end. `complete` does both. `deploy/ingress.py` puts HTTP before the
gateway, `deploy/app.py` puts replicas behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rankloom.config.serve import ServeConfig
from rankloom.config.trial import BASE
from rankloom.engine.forward import Job
from rankloom.engine.jobs import ContextError, ReplicaLostError
from rankloom.engine.pauses import allow_pauses, shorten_pauses
from rankloom.errors import (
    AdapterNotFoundError,
    IncompatibleError,
    OverloadedError,
    RankloomError,
    RegistryError,
)
from rankloom.gateway.audit import REFUSALS, classify, describe_end, format_line
from rankloom.gateway.canary import Canaries, CanaryEnd
from rankloom.gateway.errors import NameTakenError, NotLoadedError
from rankloom.gateway.in_flight import InFlightRequest
from rankloom.gateway.keys import Key
from rankloom.gateway.metrics import Metrics, Traffic
from rankloom.gateway.pace import measure_token_seconds, pace_job
from rankloom.gateway.policy import AdapterVersions, Catalogue, Decision, RoutingRequest, Target, decide_route
from rankloom.gateway.quota import Quotas
from rankloom.gateway.registry_view import RegistryView
from rankloom.gateway.replicas import Replicas, Served
from rankloom.gateway.retries import Retries
from rankloom.registry import Record, Registry

__all__ = ["Gateway", "Replicas", "Served"]

logger = logging.getLogger(__name__)


class Collector(Protocol):
    """A response that is gathered until it is whole."""

    def add(self, progress: Any) -> None: ...


MOST_RECENT = 20

CollectorT = TypeVar("CollectorT", bound=Collector)
AnswerT = TypeVar("AnswerT")


class Gateway:
    """One endpoint. Everything runs on one event loop, except reading the registry, which a thread does."""

    def __init__(self, config: ServeConfig, registry: Registry, replicas: Replicas) -> None:
        self.config = config
        self.metrics = Metrics()
        self.ready = False
        self.recent: deque[dict[str, Any]] = deque(maxlen=MOST_RECENT)
        """The facts of the last requests of clients, the latest first."""
        self._replicas = replicas
        self._registry = registry
        self._quotas = Quotas()
        self.canaries = Canaries(config.routes)
        self._loaded: dict[str, Target] = {}
        self._timing: set[str] = set()
        """Routes for which both sides of a canary are being timed."""
        self._secret: bytes | None = None
        """Known to the operators alone; sticky routes draw with it."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reading = asyncio.Lock()
        self._read: Mapping[str, AdapterVersions] = {}
        self._read_at = float("-inf")

    async def start(self) -> None:
        """Ask the replicas which base they have, read the registry, and keep reading it."""
        self.served = await self._replicas.describe()
        self.created = int(time.time())
        self.registry_view = RegistryView(self._registry, self._fits)
        self.catalogue = Catalogue(base=self.served.base)
        await self.refresh()
        shorten_pauses()
        self.ready = True
        self._run_in_background(self._keep_fresh())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        allow_pauses()

    async def is_ready(self) -> bool:
        """Return whether a request would get a response now."""
        if not self.ready:
            return False
        try:
            async with asyncio.timeout(2):
                return (await self._replicas.describe()).fingerprint == self.served.fingerprint
        except Exception:
            return False

    async def reconfigure(self, config: ServeConfig) -> None:
        """Change names, routes and limits; requests in flight continue."""
        self.config = config
        if config.routes != self.canaries.routes:
            self.canaries = Canaries(config.routes)
        await self.refresh()

    @property
    def context(self) -> int:
        """The most tokens of prompt and completion together."""
        return min(self.served.context, self.config.limits.context or self.served.context)

    # ---- what names mean

    def _fits(self, record: Record) -> bool:
        return record.base.fingerprint == self.served.fingerprint

    async def refresh(self, at_most_every_s: float = 0.0) -> None:
        """Read the registry, unless it was read within the last `at_most_every_s` seconds."""
        async with self._reading:
            if time.monotonic() - self._read_at < at_most_every_s:
                return
            if self._secret is None and any(route.sticky for route in self.config.routes.values()):
                self._secret = await asyncio.to_thread(self._read_registry_secret)
            self._read = await asyncio.to_thread(self.registry_view.read, self._list_names())
            self._read_at = time.monotonic()
            self._update_catalogue()

    def _read_registry_secret(self) -> bytes:
        try:
            return self._registry.secret()
        except RegistryError as error:
            logger.warning("sticky routes will draw anew at the next start: %s", error)
            return secrets.token_bytes(32)

    def _list_names(self) -> list[str] | None:
        if self.config.adapters == "all":
            return None
        loaded = (target.ref or "" for target in self._loaded.values())
        refs = [
            *self.config.adapters,
            *loaded,
            *(ref for route in self.config.routes.values() for ref in route.list_refs()),
        ]
        return [ref.partition("@")[0] for ref in refs if ref != BASE]

    def _update_catalogue(self) -> None:
        offered = None if self.config.adapters == "all" else tuple(self.config.adapters)
        loaded, secret = dict(self._loaded), self._secret or b""
        read = Catalogue(self.served.base, self._read, offered, self.config.routes, loaded, secret)
        followed = self.canaries.follow(read)
        if followed != self.catalogue:  # what is cached for a catalogue stays valid while the catalogue does
            self.catalogue = followed

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self.config.refresh_s)
            try:
                await self.refresh()
            except Exception:
                logger.exception("reading the registry failed")
            self.metrics.forget_replicas(time.monotonic() - 30)

    async def load(self, name: str, ref: str) -> Target:
        """Give a version of the registry a name here, once a replica has verified it.

        Raises:
            NameTakenError: the name already has a meaning.
            AdapterNotFoundError, RegistryError, IncompatibleError: the version can't be served.
        """
        taken = self.catalogue
        if name in (taken.base, BASE, *taken.routes) or (name in taken.adapters and name != ref.partition("@")[0]):
            raise NameTakenError(f"`{name}` has a meaning here already.")
        record = await asyncio.to_thread(self._registry.get, ref)
        if not self._fits(record):
            raise IncompatibleError(
                f"{record.ref} was tuned on {record.base.id} ({record.base.fingerprint[:20]}...), not on "
                f"{self.served.base} ({self.served.fingerprint[:20]}...)"
            )
        await self._replicas.load(record.ref)
        target = self._loaded[name] = Target(record.name, record.version)
        await self.refresh()
        return target

    async def unload(self, name: str) -> Target:
        """Remove a name that `load` gave. The weights are evicted when their place is needed.

        Raises:
            NotLoadedError: `load` gave no such name.
        """
        if name not in self._loaded:
            hint = " It is part of the deployment's config." if self.catalogue.resolve(name) else ""
            raise NotLoadedError(f"`{name}` was not loaded at run time.{hint}")
        target = self._loaded.pop(name)
        await self.refresh()
        return target

    async def move_alias(self, name: str, alias: str, version: int | None, key: Key | None) -> Target:
        """Point an alias to a version on this base; None: to the one before the last promotion.

        Raises:
            AdapterNotFoundError: this endpoint has no such version.
            RegistryError: the alias was not moved; the message says why.
        """
        adapter = self.catalogue.adapters.get(name)
        if adapter is None or version not in (None, *adapter.versions):
            raise AdapterNotFoundError(f"This endpoint has no {name}{'' if version is None else f'@{version}'}.")
        rollback, promote = partial(self._registry.rollback, name), partial(self._registry.promote, f"{name}@{version}")
        try:
            record = await asyncio.to_thread(rollback if version is None else promote, alias)
        except RankloomError as error:
            raise RegistryError(self._hide_paths(str(error))) from None
        logger.warning(format_line("alias moved", None, alias=alias, to=record.ref, key=key and key.id))
        await self.refresh()
        return Target(record.name, record.version)

    # ---- a request

    def admit(self, key: Key | None) -> None:
        """Count a request against its key. Raises RateLimitedError where the key has used up its share."""
        self._quotas.admit(key, time.monotonic())

    async def begin(
        self, routing: RoutingRequest, job: Job, key: Key | None = None, retries: Retries | None = None
    ) -> InFlightRequest:
        """Send a request to its target and wait for its first tokens.

        Args:
            retries: of the same request's attempts so far; None: this is the first one.

        Raises:
            RequestError: it can't be served as it stands; AdapterNotFoundError, RegistryError, IncompatibleError: its
                adapter can't; RateLimitedError, OverloadedError, ReplicaLostError, TimeoutError: a later one may be.
        """
        self._check_length(job)
        decision = await self._decide(routing)
        self._quotas.check_room(key, self.config.limits.in_flight)
        if decision.shadow is not None and self._quotas.in_flight < self.config.limits.in_flight // 2:
            self._run_in_background(self._shadow(decision.shadow, replace(job, id=f"{job.id}-shadow")))
        deadline = time.monotonic() + self.config.limits.timeout_s
        retries = retries or self._make_retries()
        refusal: Exception | None = None
        for target in decision.targets:
            request = self._make_request(
                job=job, routing=routing, decision=decision, target=target, key=key, traffic="live",
                deadline=deadline, retries=retries,
            )  # fmt: skip
            try:
                await request.open()
            except REFUSALS as error:
                refusal = error
                logger.warning(format_line("refused", routing, adapter=target.ref, reason=str(error)))
                continue
            return request
        assert refusal is not None
        raise type(refusal)(self._hide_paths(str(refusal)))

    async def complete(
        self, routing: RoutingRequest, job: Job, key: Key | None, collector: Callable[[], CollectorT]
    ) -> tuple[CollectorT, Target]:
        """Do a whole job, again from its start when its replica is lost, as nothing has been sent yet.

        Args:
            collector: makes an empty response, one for each attempt.

        Returns:
            The response, and the version that wrote it.

        Raises:
            As `begin`.
        """
        retries = self._make_retries()
        while True:
            request, response = await self.begin(routing, job, key, retries), collector()
            try:
                async for progress in request:
                    response.add(progress)
                return response, request.target
            except ReplicaLostError as error:
                await retries.pause(error)
            finally:
                await request.aclose()

    async def ask(
        self, routing: RoutingRequest, key: Key | None, question: Callable[[Replicas], Awaitable[AnswerT]]
    ) -> AnswerT:
        """Ask a replica for what takes no step of its engine, and costs no tokens. Raises as `begin`."""
        await self._decide(routing)
        self._quotas.check_room(key, self.config.limits.in_flight)
        begun, retries, ended_by = time.monotonic(), self._make_retries(), None
        self._quotas.begin(key, 0, begun)
        self.metrics.in_flight.inc()
        try:
            async with asyncio.timeout(self.config.limits.timeout_s):
                while True:
                    try:
                        return await question(self._replicas)
                    except ReplicaLostError as error:
                        await retries.pause(error)
        except BaseException as error:
            ended_by = error
            raise
        finally:
            now = time.monotonic()
            self._quotas.end(key, 0, 0, now)
            self.metrics.in_flight.dec()
            facts = {"outcome": classify(ended_by), "key": key and key.id, "total_s": round(now - begun, 4)}
            logger.info(format_line("question", routing, **facts))

    def _make_retries(self) -> Retries:
        return Retries(on_retry=self.metrics.retries.inc)

    def _hide_paths(self, text: str) -> str:
        """Return an error's text for clients: without this machine's paths."""
        root = self._registry.root
        for place in (root if "://" in root else str(Path(root).expanduser().absolute()), root):
            text = text.replace(place, "the registry")
        return text.replace(self.catalogue.base, self.catalogue.public_base)

    def _check_length(self, job: Job) -> None:
        """Refuse prompts of tokens that are too long for every replica, before they are sent."""
        room = self.context
        longest = max((len(prompt) for prompt in job.prompts if isinstance(prompt, tuple)), default=0)
        if longest > room:
            raise ContextError(
                f"This model's maximum context length is {room} tokens. However, your request needs more: {longest} in "
                f"the prompt. Shorten the prompt."
            )

    async def _decide(self, routing: RoutingRequest) -> Decision:
        try:
            return decide_route(routing, self.catalogue)
        except AdapterNotFoundError:
            await self.refresh(at_most_every_s=1.0)  # it may have been published just now
            return decide_route(routing, self.catalogue)

    async def _shadow(self, target: Target, job: Job) -> None:
        """Do a copy of a job for its metrics alone; drop the result and any error."""
        with contextlib.suppress(Exception):
            async for _ in await self._begin_own(target, job, "shadow"):
                pass

    async def _begin_own(self, target: Target, job: Job, traffic: Traffic) -> InFlightRequest:
        """Begin a job of the endpoint's own. Raises as `InFlightRequest.open` does."""
        request = self._make_request(
            job=job, routing=RoutingRequest(model=target.ref or BASE, id=job.id), decision=Decision((target,)),
            target=target, key=None, traffic=traffic, deadline=time.monotonic() + self.config.limits.timeout_s,
            retries=self._make_retries(),
        )  # fmt: skip
        await request.open()
        return request

    async def _time_sides(self, route: str, stable: Target, candidate: Target) -> None:
        """Run the same job on both sides of a canary, one after the other, and compare their pace."""
        sides, begun, stable_took_s = (stable, candidate), time.monotonic(), float("inf")
        try:
            stable_s = await measure_token_seconds(await self._begin_own(stable, pace_job(), "pace"))
            stable_took_s = time.monotonic() - begun
            candidate_s = await measure_token_seconds(await self._begin_own(candidate, pace_job(), "pace"))
        except Exception as error:
            logger.info(format_line("canary: not timed", None, route=route, error=type(error).__name__))
            # the candidate fails at what the stable version has just done quickly; refusals count in its own requests
            is_soon = stable_took_s < self.config.limits.timeout_s / 4
            if is_soon and not isinstance(error, (*REFUSALS, OverloadedError, ReplicaLostError)):
                self._carry_out(self.canaries.record_failure(route, sides))
        else:
            self._carry_out(self.canaries.record_times(route, sides, (stable_s, candidate_s)))
        finally:
            self._timing.discard(route)

    def _make_request(
        self,
        *,
        job: Job,
        routing: RoutingRequest,
        decision: Decision,
        target: Target,
        key: Key | None,
        traffic: Traffic,
        deadline: float,
        retries: Retries,
    ) -> InFlightRequest:
        self._quotas.begin(key, job.most_tokens, time.monotonic())
        self.metrics.in_flight.inc()
        return InFlightRequest(
            job=replace(job, adapter=target.ref), routing=routing, decision=decision, target=target, key=key,
            traffic=traffic, deadline=deadline, run=self._replicas.run, retries=retries, on_end=self._finish,
        )  # fmt: skip

    def _finish(self, request: InFlightRequest, error: BaseException | None) -> None:
        """Measure, charge, log and judge a request that has ended."""
        now, job = time.monotonic(), request.job
        self._quotas.end(request.key, job.most_tokens, request.prompt_tokens + request.tokens, now)
        self.metrics.in_flight.dec()
        if error is None:
            self._run_in_background(request.drain())
        first_s = between_s = None
        if request.first_at is not None:
            first_s = request.first_at - request.begun_at
            between_s = (now - request.first_at) / (request.tokens - 1) if request.tokens > 1 else None
        tokens = {"prompt": request.prompt_tokens, "cached": request.cached_tokens, "completion": request.tokens}
        self.metrics.count_request(
            request.target.ref or BASE, request.traffic, classify(error), tokens=tokens, first_s=first_s,
            token_s=between_s,
        )  # fmt: skip
        facts = describe_end(request, error, now, first_s)
        logger.info(format_line("request", request.routing, **facts))
        if request.traffic == "live":
            self.recent.appendleft({"model": request.routing.model, "at": time.time()} | facts)
            self._judge(request, error)

    def _judge(self, request: InFlightRequest, error: BaseException | None) -> None:
        """Count a request for its side of a canary, and have both sides timed."""
        if error is None or isinstance(error, REFUSALS):  # other errors may be the request's fault, or a replica's
            self._carry_out(self.canaries.count(request.decision, request.target, refused=error is not None))
        route = request.decision.route
        sides = self.canaries.find_arms_to_time(route) if request.decision.arm == "canary" else None
        if route is None or sides is None or route in self._timing:
            return
        if self._quotas.in_flight < self.config.limits.in_flight:
            self._timing.add(route)  # now: another request may end before the task begins
            self._run_in_background(self._time_sides(route, *sides))

    def _carry_out(self, end: CanaryEnd | None) -> None:
        if end is not None:
            self._update_catalogue()
            self._run_in_background(self._move_alias(end))

    async def _move_alias(self, end: CanaryEnd) -> None:
        try:
            await asyncio.to_thread(self._registry.promote, end.ref, end.alias)
        except RankloomError as error:
            logger.error(
                format_line("canary: the alias was not moved", None, alias=end.alias, to=end.ref, reason=str(error))
            )
        await self.refresh()

    def _run_in_background(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
