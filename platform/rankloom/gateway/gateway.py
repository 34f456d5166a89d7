"""An endpoint's mind: names, limits, retries, fallbacks, canaries, measures. It knows neither HTTP nor Ray.

A request's way: `begin` decides where it goes, and waits for the first tokens, so that whatever is wrong is known
before anything is answered; the `InFlightRequest` is then read to its end. `deploy/ingress.py` puts HTTP before it,
`deploy/app.py` processes behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rankloom.config.serve import ServeConfig
from rankloom.config.trial import BASE
from rankloom.engine.jobs import CompletionJob, ContextError, JobProgress, ReplicaLostError
from rankloom.engine.pauses import allow_pauses, shorten_pauses
from rankloom.errors import AdapterNotFoundError, IncompatibleError, OverloadedError, RankloomError, RegistryError
from rankloom.gateway.canary import Canaries, CanaryEnd
from rankloom.gateway.in_flight import InFlightRequest
from rankloom.gateway.keys import Key
from rankloom.gateway.metrics import Metrics, Outcome, Traffic
from rankloom.gateway.openai.requests import WireError, wire_error
from rankloom.gateway.pace import pace_work, token_seconds
from rankloom.gateway.policy import AdapterVersions, Catalogue, Decision, RoutingRequest, Target, decide_route
from rankloom.gateway.quota import Quotas
from rankloom.gateway.registry_view import RegistryView
from rankloom.registry import Record, Registry

_REFUSED = (AdapterNotFoundError, RegistryError, IncompatibleError)

logger = logging.getLogger("ray.serve")  # Serve's own, whose level and format the deployment sets


@dataclass(frozen=True)
class Served:
    """The base, as the processes that hold it say."""

    base: str
    fingerprint: str
    quantization: str
    context: int


class Replicas(Protocol):
    """The processes that do the work."""

    def run(self, work: CompletionJob) -> AsyncIterator[JobProgress]:
        """As `engine.jobs.run`; ReplicaLostError where the process goes."""
        ...

    async def describe(self) -> Served: ...

    async def load(self, ref: str) -> None:
        """Load and verify an adapter where its requests will go. Raises as `Engine.pin` does."""
        ...


class Gateway:
    """One endpoint. Everything runs on one event loop; reading the registry, in a thread."""

    def __init__(self, config: ServeConfig, registry: Registry, replicas: Replicas) -> None:
        self.config = config
        self.metrics = Metrics()
        self.ready = False
        self._replicas = replicas
        self._registry = registry
        self._quotas = Quotas()
        self._canaries = Canaries(config.routes)
        self._loaded: dict[str, Target] = {}
        self._timing: set[str] = set()
        """Routes whose canary's sides are being timed."""
        self._secret: bytes | None = None
        """What only this endpoint's operators know, which draws the sides of sticky routes."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reading = asyncio.Lock()
        self._read: Mapping[str, AdapterVersions] = {}
        self._read_at = float("-inf")

    async def start(self) -> None:
        """Ask the replicas which base they have, read the registry, and keep reading it."""
        self.served = await self._replicas.describe()
        self.created = int(time.time())
        self.shelves = RegistryView(self._registry, self._fits)
        self.catalogue = Catalogue(base=self.served.base)
        await self.refresh()
        shorten_pauses()
        self.ready = True
        self._background(self._keep_fresh())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        allow_pauses()

    async def answers(self) -> bool:
        """Whether a request would be answered now."""
        if not self.ready:
            return False
        try:
            async with asyncio.timeout(2):
                return (await self._replicas.describe()).fingerprint == self.served.fingerprint
        except Exception:
            return False

    async def reconfigure(self, config: ServeConfig) -> None:
        """Go on with other names, routes and limits."""
        self.config = config
        if config.routes != self._canaries.routes:
            self._canaries = Canaries(config.routes)
        await self.refresh()

    # ---- what names mean

    def _fits(self, record: Record) -> bool:
        return record.base.fingerprint == self.served.fingerprint

    async def refresh(self, at_most_every_s: float = 0.0) -> None:
        """Read the registry, unless that was done just now."""
        async with self._reading:
            if time.monotonic() - self._read_at < at_most_every_s:
                return
            if self._secret is None and any(route.sticky for route in self.config.routes.values()):
                self._secret = await asyncio.to_thread(self._find_secret)
            self._read = await asyncio.to_thread(self.shelves.read, self._names())
            self._read_at = time.monotonic()
            self._put_up()

    def _find_secret(self) -> bytes:
        try:
            return self._registry.secret()
        except RegistryError as error:
            logger.warning("sticky routes will draw anew at the next start: %s", error)
            return secrets.token_bytes(32)

    def _names(self) -> list[str] | None:
        if self.config.adapters == "all":
            return None
        loaded = (target.ref or "" for target in self._loaded.values())
        refs = [*self.config.adapters, *loaded, *(ref for route in self.config.routes.values() for ref in route.refs())]
        return [ref.partition("@")[0] for ref in refs if ref != BASE]

    def _put_up(self) -> None:
        offered = None if self.config.adapters == "all" else tuple(self.config.adapters)
        loaded, secret = dict(self._loaded), self._secret or b""
        read = Catalogue(self.served.base, self._read, offered, self.config.routes, loaded, secret)
        followed = self._canaries.follow(read)
        if followed != self.catalogue:  # what was made of it is kept while it stays
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
            WireError: the name is taken. AdapterNotFoundError, RegistryError, IncompatibleError: it can't be served.
        """
        taken = self.catalogue
        if name in (taken.base, BASE, *taken.routes) or (name in taken.shelves and name != ref.partition("@")[0]):
            raise WireError(400, f"`{name}` has a meaning here already.", param="lora_name")
        record = await asyncio.to_thread(self._registry.get, ref)
        if not self._fits(record):
            raise IncompatibleError(
                f"{record.ref} was tuned on {record.base.id} ({record.base.fingerprint[:20]}...), not on "
                f"{self.served.base} ({self.served.fingerprint[:20]}...)"
            )
        await self._replicas.load(record.ref)
        self._loaded[name] = Target(record.name, record.version)
        await self.refresh()
        return self._loaded[name]

    async def unload(self, name: str) -> Target:
        """Take such a name away. Its weights go when their place is needed. Raises WireError where there is none."""
        if name not in self._loaded:
            hint = " It is part of the deployment's config." if self.catalogue.asked(name) else ""
            raise WireError(
                404, f"`{name}` was not loaded at run time.{hint}", code="model_not_found", param="lora_name"
            )
        target = self._loaded.pop(name)
        await self.refresh()
        return target

    # ---- a request

    def admit(self, key: Key | None) -> None:
        """Count a request against its key. Raises WireError 429 where it has used up its share."""
        self._quotas.admit(key, time.monotonic())

    async def begin(self, ask: RoutingRequest, work: CompletionJob, key: Key | None = None) -> InFlightRequest:
        """Send a request where it belongs, and wait for its first tokens.

        Raises:
            Whatever `wire_error` knows.
        """
        self._check_length(work)
        decision = await self._decide(ask)
        self._quotas.check_room(key, self.config.limits.in_flight)
        if decision.shadow is not None and self._quotas.in_flight < self.config.limits.in_flight // 2:
            self._background(self._shadow(decision.shadow, replace(work, id=f"{work.id}-shadow")))
        deadline = time.monotonic() + self.config.limits.timeout_s
        refused: Exception | None = None
        for target in decision.targets:
            answer = self._answer(work, target, decision, ask, key, deadline, "live")
            try:
                await answer.open()
            except _REFUSED as error:
                refused = error
                logger.warning(_line("refused", ask, adapter=target.ref, reason=str(error)))
                continue
            return answer
        assert refused is not None
        raise type(refused)(self._public(str(refused)))

    def _public(self, text: str) -> str:
        """An error's text without the places of this machine, which are no client's business."""
        root = self._registry.root
        for place in (root if "://" in root else str(Path(root).expanduser().absolute()), root):
            text = text.replace(place, "the registry")
        return text.replace(self.catalogue.base, self.catalogue.shown)

    def _check_length(self, work: CompletionJob) -> None:
        """Refuse prompts of tokens that no replica can take, instead of sending them there."""
        room = min(self.served.context, work.context or self.served.context)
        longest = max((len(prompt) for prompt in work.prompts if isinstance(prompt, tuple)), default=0)
        if longest > room:
            raise ContextError(
                f"This model's maximum context length is {room} tokens. However, your request needs more: {longest} in "
                f"the prompt. Shorten the prompt."
            )

    async def _decide(self, ask: RoutingRequest) -> Decision:
        try:
            return decide_route(ask, self.catalogue)
        except AdapterNotFoundError:
            await self.refresh(at_most_every_s=1.0)  # it may have been published just now
            return decide_route(ask, self.catalogue)

    async def _shadow(self, target: Target, work: CompletionJob) -> None:
        """Do the work a second time for nobody."""
        with contextlib.suppress(Exception):  # it is measured, and nobody waits for it
            async for _ in await self._unasked(target, work, "shadow"):
                pass

    async def _unasked(self, target: Target, work: CompletionJob, traffic: Traffic) -> InFlightRequest:
        """The endpoint's own work, begun. Raises as `InFlightRequest.open` does."""
        ask = RoutingRequest(model=target.ref or BASE, id=work.id)
        deadline = time.monotonic() + self.config.limits.timeout_s
        answer = self._answer(work, target, Decision((target,)), ask, None, deadline, traffic)
        await answer.open()
        return answer

    async def _time_sides(self, route: str, stable: Target, candidate: Target) -> None:
        """Give both sides of a canary the same work, one after the other, and compare."""
        self._timing.add(route)
        sides, begun, stable_took_s = (stable, candidate), time.monotonic(), float("inf")
        try:
            stable_s = await token_seconds(await self._unasked(stable, pace_work(), "pace"))
            stable_took_s = time.monotonic() - begun
            candidate_s = await token_seconds(await self._unasked(candidate, pace_work(), "pace"))
        except Exception as error:
            logger.info(_line("canary: not timed", None, route=route, error=type(error).__name__))
            # what the stable version has just done, and soon, the candidate can't; its refusals show in its requests
            is_soon = stable_took_s < self.config.limits.timeout_s / 4
            if is_soon and not isinstance(error, (*_REFUSED, OverloadedError, ReplicaLostError)):
                self._moved(self._canaries.failed(route, sides))
        else:
            self._moved(self._canaries.timed(route, sides, (stable_s, candidate_s)))
        finally:
            self._timing.discard(route)

    def _answer(
        self,
        work: CompletionJob,
        target: Target,
        decision: Decision,
        ask: RoutingRequest,
        key: Key | None,
        deadline: float,
        traffic: Traffic,
    ) -> InFlightRequest:
        self._quotas.begin(key, _most_tokens(work), time.monotonic())
        self.metrics.in_flight.inc()
        lost = self.metrics.retries.inc
        work = replace(work, adapter=target.ref)
        return InFlightRequest(
            self._replicas.run, self._ended, lost, work, target, decision, ask, key, deadline, traffic
        )

    def _ended(self, answer: InFlightRequest, error: BaseException | None) -> None:
        """Measure, charge, log and judge a request that is over."""
        now, work = time.monotonic(), answer.work
        self._quotas.end(answer.key, _most_tokens(work), answer.prompt_tokens + answer.tokens, now)
        self.metrics.in_flight.dec()
        if error is None:
            self._background(answer.drain())
        outcome = _outcome(error)
        adapter = answer.target.ref or BASE
        first_s = between_s = None
        if answer.first_at is not None:
            first_s = answer.first_at - answer.begun_at
            between_s = (now - answer.first_at) / (answer.tokens - 1) if answer.tokens > 1 else None
        tokens = {"prompt": answer.prompt_tokens, "cached": answer.cached_tokens, "completion": answer.tokens}
        self.metrics.ended(adapter, answer.traffic, outcome, tokens=tokens, first_s=first_s, token_s=between_s)
        facts = {
            "adapter": adapter, "traffic": answer.traffic, "outcome": outcome, "key": answer.key and answer.key.id,
            "route": answer.decision.route, "arm": answer.decision.arm, "prompts": len(work.prompts), "n": work.n,
            "prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens, "first_s": _round(first_s),
            "total_s": _round(now - answer.begun_at), "error": type(error).__name__ if error else None,
        }  # fmt: skip
        logger.info(_line("request", answer.ask, **facts))
        if answer.traffic == "live":
            self._judge(answer, error)

    def _judge(self, answer: InFlightRequest, error: BaseException | None) -> None:
        """Let an answer count for its side of a canary, and have both sides timed."""
        if error is None or isinstance(error, _REFUSED):  # all else may be the request's doing, or a replica's
            self._moved(self._canaries.count(answer.decision, answer.target, refused=error is not None))
        route = answer.decision.route
        sides = self._canaries.to_time(route) if answer.decision.arm == "canary" else None
        if route is None or sides is None or route in self._timing:
            return
        if self._quotas.in_flight < self.config.limits.in_flight:
            self._background(self._time_sides(route, *sides))

    def _moved(self, move: CanaryEnd | None) -> None:
        if move is not None:
            self._put_up()
            self._background(self._move(move))

    async def _move(self, move: CanaryEnd) -> None:
        try:
            await asyncio.to_thread(self._registry.promote, move.ref, move.alias)
        except RankloomError as error:
            logger.error(
                _line("canary: the alias was not moved", None, alias=move.alias, to=move.ref, reason=str(error))
            )
        await self.refresh()

    def _background(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _outcome(error: BaseException | None) -> Outcome:
    if isinstance(error, Exception):
        return "server error" if wire_error(error).status >= 500 else "client error"
    return "ok" if error is None else "cancelled"


def _most_tokens(work: CompletionJob) -> int:
    """How many tokens the completions of some work may have."""
    each = work.sampling.max_tokens if work.max_tokens is None else work.max_tokens
    return len(work.prompts) * work.n * each


def _line(what: str, ask: RoutingRequest | None, **facts: Any) -> str:
    """A line for the log. It never has a prompt or a key in it."""
    head = {"event": what} | ({"id": ask.id, "request_id": ask.trace, "model": ask.model} if ask else {})
    return json.dumps(head | {name: value for name, value in facts.items() if value is not None})


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
