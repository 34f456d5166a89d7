"""VllmEngine: the `Engine` of `protocol.py` on a vLLM server, which is a process of its own (`server.py`).

vLLM batches and computes. What requests mean is the same as in `engine.py`: tokens and text are made here, adapters are
verified before requests reach them, and their residency is decided here. vLLM knows each by its exact version, and gets
it as plain LoRA or DoRA, which `plugin/` teaches it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from rankloom.adapters.probe import check_top_logprobs, probe_tokens
from rankloom.banks.plain_lora import list_more_than_lora, write_plain
from rankloom.banks.served_adapter import Factors, ServedAdapter, fold
from rankloom.config.engine import VllmConfig
from rankloom.engine.adapter_cache.cache import AdapterCache
from rankloom.engine.adapter_cache.loading import check_base
from rankloom.engine.admission import STOPPING, check_ref
from rankloom.engine.forward import ForwardJob, ForwardProgress
from rankloom.engine.frontend import EngineFrontend, count_vocabulary
from rankloom.engine.jobs import ReplicaLostError
from rankloom.engine.pauses import allow_pauses, shorten_pauses
from rankloom.engine.protocol import Delta, Request, Resident, SampledToken, Stats
from rankloom.engine.text import Stops
from rankloom.engine.transcript import Transcript
from rankloom.engine.vllm.forwarding import ForwardReader, make_forward_body
from rankloom.engine.vllm.server import ZERO, VllmServer, make_completion_body, parse_likelihoods
from rankloom.errors import ModelError, OverloadedError, RankloomError, RegistryError, RequestError
from rankloom.models import Base, find_target_linears, get_linear_widths
from rankloom.registry import Registry
from rankloom.registry.checks import rename_in_errors

logger = logging.getLogger(__name__)


class VllmEngine(EngineFrontend):
    """The `Engine` of `protocol.py`."""

    def __init__(self, base: Base, registry: Registry, config: VllmConfig, *, threads: int, gpus: float = 1.0) -> None:
        """Raises ConfigError where vLLM is not installed.

        Args:
            base: an outline is enough (`models.load_outline`).
            threads: of vLLM's arithmetic on a CPU.
            gpus: that are reserved for it, where torch finds one.
        """
        dtype = str(base.model.dtype).removeprefix("torch.")
        on_gpu = gpus > 0 and torch.cuda.is_available()
        super().__init__(base, config, config.resolve_num_seqs(on_gpu=on_gpu), follows_grammars=False)
        self._server = VllmServer(
            config, base.folder, dtype, threads=threads, on_gpu=on_gpu, gpus=gpus,
            tool_call_parser=self._chat.tool_call_parser,
        )  # fmt: skip
        self._loader = VllmLoader(base, registry, self._server, config)
        self._adapters: AdapterCache[VllmAdapter] = AdapterCache(
            config.max_cpu_loras, self._loader, self._post, self._fail_arriving
        )
        self._arriving: dict[str, list[asyncio.Future[None]]] = {}
        """Requests that wait for their adapter, by its ref."""
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    @property
    def context(self) -> int:
        return self._server.context

    @property
    def alive(self) -> bool:
        return not self._admission.stopping and self._server.alive

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        shorten_pauses()
        await self._server.start()
        if self._server.base == ZERO:
            await asyncio.to_thread(self._loader.send_zero)

    async def close(self) -> None:
        self._admission.stopping = True
        stopping = OverloadedError(STOPPING)
        self._adapters.close(stopping)
        for ref in list(self._arriving):
            self._fail_arriving(ref, stopping)
        await self._server.close()
        self._guides.close()
        allow_pauses()

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        if request.pooling is not None:
            raise RequestError(
                "embeddings: vLLM's server generates here; use engine.type=bank, or a pooling model: --runner=pooling"
            )
        with self._admission.take(request, self.context):
            guide = await self._guides.make_guide(request)  # refuses choices that become the same tokens
            async with self._hold(request.adapter):
                try:
                    async with aclosing(self._complete(request, guide.stops)) as deltas:
                        async for delta in deltas:
                            self._generated_tokens += len(delta.tokens)
                            yield delta
                except ReplicaLostError:
                    if self._admission.stopping:
                        raise OverloadedError(STOPPING) from None
                    raise

    @property
    def routes(self) -> Mapping[str, tuple[str, ...]]:
        return self._server.routes

    async def forward(self, job: ForwardJob) -> AsyncIterator[ForwardProgress]:
        """See `Forwarder`."""
        with self._admission.hold(job.id, job.adapter, job.tenant):
            body = make_forward_body(job, job.adapter or self._server.base, self.routes.get(job.path, ()))
            reader = ForwardReader(job)
            async with self._hold(job.adapter):
                try:
                    async with aclosing(self._server.ask(job.path, body)) as answer:
                        async for event, part in answer:
                            if (progress := reader.read(event, part)) is not None:
                                yield progress
                except ReplicaLostError:
                    if self._admission.stopping:
                        raise OverloadedError(STOPPING) from None
                    raise
                finally:
                    self._prompt_tokens += reader.prompt_tokens - reader.cached_tokens
                    self._cached_tokens += reader.cached_tokens
                    self._generated_tokens += reader.tokens
            if reader.streams:
                yield reader.finish()

    async def pin(self, ref: str) -> None:
        self._admission.refuse_if_stopping()
        check_ref(ref)
        done: Future[None] = Future()
        self._adapters.pin(ref, done)
        self._adapters.load_next()
        await asyncio.wrap_future(done)

    async def unpin(self, ref: str) -> None:
        self._adapters.unpin(ref)
        self._adapters.load_next()

    def list_resident(self) -> tuple[Resident, ...]:
        return self._adapters.list_resident()

    def get_stats(self) -> Stats:
        gauges, num_open = self._server.gauges, len(self._admission.open)
        running = min(num_open, int(gauges.get("vllm:num_requests_running", 0)))
        capacity = gauges.get("cache_tokens", 0)
        return Stats(
            running=running,
            waiting=num_open - running,
            cache_tokens=int(capacity * gauges.get("vllm:kv_cache_usage_perc", 0)),
            cache_capacity=int(capacity),
            steps=int(gauges.get("vllm:iteration_tokens_total_count", 0)),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=int(gauges.get("vllm:num_preemptions_total", 0)),
            adapter_loads=self._adapters.num_loads,
            adapter_evictions=self._adapters.num_evictions,
            adapter_failures=self._adapters.num_failures,
        )

    async def _complete(self, request: Request, stops: Stops) -> AsyncGenerator[Delta, None]:
        """Generate with vLLM. Its usage, which has the number of cached tokens, comes after the last delta."""
        asked = request.sampling
        is_free = asked.choices is None and asked.grammar is None
        ends = frozenset() if asked.ignore_eos and is_free else self._prompts.end_ids
        transcript = Transcript(self._get_decoder(request), request.prompt, stops, ends)
        last, cached, is_begun = None, 0, False
        body = make_completion_body(request, request.adapter or self._server.base, ends)
        async with aclosing(self._server.ask("/v1/completions", body)) as chunks:
            async for _, chunk in chunks:
                for choice in chunk["choices"]:
                    prompt = () if is_begun else _take_prompt(choice, request)
                    delta = replace(_make_delta(choice, transcript, asked.logprobs), prompt_logprobs=prompt)
                    is_begun = True
                    if delta.finish is None:
                        yield delta
                    else:
                        last = delta
                if transcript.stopped:  # vLLM knows nothing of it
                    break
                details = (chunk.get("usage") or {}).get("prompt_tokens_details") or {}
                cached = details.get("cached_tokens") or cached
        if last is None:
            raise ReplicaLostError("vLLM's server ended a stream in the middle")
        self._prompt_tokens += len(request.prompt) - cached
        self._cached_tokens += cached
        yield replace(last, cached_tokens=cached)

    @asynccontextmanager
    async def _hold(self, ref: str | None) -> AsyncIterator[None]:
        """Keep an adapter in memory for the duration of the context. Raises as loading it does."""
        if ref is None:
            yield
            return
        if (refusal := self._adapters.get_refusal(ref)) is not None:
            raise refusal
        self._adapters.ask(ref)
        self._adapters.load_next()
        arrival = self._loop.create_future()
        try:
            if self._adapters.get(ref) is None:
                self._arriving.setdefault(ref, []).append(arrival)
                await arrival
            yield
        finally:
            failed = arrival.done() and not arrival.cancelled() and arrival.exception() is not None
            if not failed:  # the cache has forgotten one that failed
                self._adapters.release(ref)
                self._adapters.load_next()

    def _post(self, call: Callable[[], None]) -> None:
        """Call a function on the event loop. Thread-safe."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._run_call, call)

    def _run_call(self, call: Callable[[], None]) -> None:
        call()
        self._adapters.load_next()
        for ref in [ref for ref in self._arriving if self._adapters.get(ref) is not None]:
            for arrival in self._arriving.pop(ref):
                if not arrival.done():
                    arrival.set_result(None)

    def _fail_arriving(self, ref: str, error: RankloomError) -> None:
        for arrival in self._arriving.pop(ref, ()):
            if not arrival.done():
                arrival.set_exception(error)


def _take_prompt(choice: dict[str, Any], request: Request) -> tuple[SampledToken, ...]:
    """Remove what the first choice of a stream has of the prompt, and return the logprobs of its tokens."""
    asked, count = request.sampling, len(request.prompt)
    if not asked.max_tokens:
        choice["token_ids"] = []  # vLLM generates one
    if asked.prompt_logprobs is None:
        return ()
    found = []
    named = choice["logprobs"]
    tops = [parse_likelihoods(top or {}) for top in named["top_logprobs"][:count]]
    for token, logprob, top in zip(request.prompt, named["token_logprobs"], tops, strict=False):
        found.append(SampledToken(token, logprob, tuple(top.items())[: asked.prompt_logprobs]))
    choice["logprobs"] = {name: named[name][count:] for name in ("token_logprobs", "top_logprobs")}
    return tuple(found)


def _make_delta(choice: Mapping[str, Any], transcript: Transcript, num_logprobs: int | None) -> Delta:
    finish: Literal["stop", "length"] | None = choice["finish_reason"]
    tokens, text = choice["token_ids"] or [], ""
    if finish not in (None, "stop", "length"):
        raise ModelError(f"vLLM ended a completion with {finish!r}")
    sampled: list[list[SampledToken]] = [[] for _ in tokens]
    if num_logprobs is not None:
        named = choice["logprobs"] or {"token_logprobs": [], "top_logprobs": []}
        sampled = [
            [SampledToken(token, logprob, tuple(parse_likelihoods(top).items())[:num_logprobs])]
            for token, logprob, top in zip(tokens, named["token_logprobs"], named["top_logprobs"], strict=True)
        ]
    kept: list[int] = []
    for token, chosen in zip(tokens, sampled, strict=True):
        kept.append(token)
        text += transcript.push([token], chosen)
        if transcript.stopped:
            break
    if finish is not None:
        text += transcript.finish()
    if transcript.stopped:
        finish = "stop"
    return Delta(text, tuple(kept), transcript.take_logprobs(last=finish is not None), finish)


@dataclass(frozen=True)
class VllmAdapter:
    """An adapter that vLLM has loaded."""

    folder: Path
    num_bytes: int


class VllmLoader:
    """Fetches an adapter from the registry, checks it, makes it plain, and has vLLM load and probe it."""

    def __init__(self, base: Base, registry: Registry, server: VllmServer, config: VllmConfig) -> None:
        self._base, self._registry, self._server = base, registry, server
        self._max_rank, self._dora = config.max_lora_rank, config.dora
        self._sent: dict[str, VllmAdapter] = {}
        self._numbers = itertools.count()

    def load(self, ref: str) -> VllmAdapter:
        """Load a version. Raises as `EngineLoader.load`, and RegistryError where vLLM can't serve it."""
        record = self._registry.get(ref)
        check_base(self._base, record)
        folder = self._server.scratch / f"{next(self._numbers)}"  # a new one each time: vLLM caches by path
        with TemporaryDirectory(prefix="rankloom-") as scratch, rename_in_errors(Path(scratch) / "adapter", ref):
            fetched = self._registry.fetch(record.ref, Path(scratch) / "adapter")
            if more := list_more_than_lora(self._base.model, fetched, allow_dora=self._dora):
                served = "LoRA and DoRA" if self._dora else "with engine.dora=false LoRA"
                raise RegistryError(
                    f"{ref} has {' and '.join(more)}, but vLLM serves {served} on linear layers alone; use "
                    f"engine.type=bank, or a base of its own: rankloom adapters export {ref} --format merged"
                )
            adapter = fold(self._base.model, fetched, keep_magnitudes=True)
            if adapter.rank > self._max_rank:
                raise RegistryError(
                    f"{ref} is of rank {adapter.rank}, above engine.max_lora_rank={self._max_rank}; raise it"
                )
            write_plain(adapter, folder)
            try:
                self._server.load(ref, folder)
                self._probe(ref, fetched)
            except BaseException:
                self._drop(ref, folder)
                raise
        self._sent[ref] = VllmAdapter(folder, adapter.num_bytes)
        return self._sent[ref]

    def send_zero(self) -> None:
        """Load an adapter that changes nothing."""
        name = find_target_linears(self._base.model, "all-linear")[0]
        num_in, num_out = get_linear_widths(self._base.model.get_submodule(name))
        nothing = Factors(torch.zeros(1, num_in), torch.zeros(1, num_out), None, None)
        write_plain(ServedAdapter({name: nothing}, {}, {}), self._server.scratch / ZERO)
        self._server.load(ZERO, self._server.scratch / ZERO)

    def forget(self, ref: str) -> None:
        self._drop(ref, self._sent.pop(ref).folder)

    def _probe(self, ref: str, folder: Path) -> None:
        tokens = probe_tokens(folder, count_vocabulary(self._base))
        found, plain = self._server.get_likeliest(ref, tokens), self._server.get_likeliest(self._server.base, tokens)
        check_top_logprobs(folder, found, plain, dtype=self._base.model.dtype)

    def _drop(self, ref: str, folder: Path) -> None:
        try:
            self._server.unload(ref)
        except RankloomError as error:  # it has not got it, or is gone
            logger.debug("unloading %s: %s", ref, error)
        shutil.rmtree(folder, ignore_errors=True)
