"""A device that runs out of memory, or is lost, under a serving engine: what waits, what is refused, what ends."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankloom import kernels
from rankloom.banks import slot_table
from rankloom.engine.engine import ServingEngine
from rankloom.engine.kv_cache import NARROWEST, KvCache, KvShape
from rankloom.engine.model_runner import ModelRunner
from rankloom.engine.runner import StepOutputs
from rankloom.errors import ModelError, OverloadedError
from served import completed, engine_on, publish, serving, with_peft, write_adapter

SHAPE = KvShape.repeat(num_layers=3, num_heads=1, width=3, dtype=torch.float32, device=torch.device("cpu"))
ROOMY = 1 << 20


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[torch.Tensor], bool]], None]:
    """Given a condition, blocks of the cache that do not meet it are not allocated."""
    condition: list[Callable[[torch.Tensor], bool]] = [lambda _: True]
    new_zeros = torch.Tensor.new_zeros

    def limited(self: torch.Tensor, *shape: Any, **kwargs: Any) -> torch.Tensor:
        block = new_zeros(self, *shape, **kwargs)
        if not condition[0](block):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return block

    monkeypatch.setattr(torch.Tensor, "new_zeros", limited)
    return lambda met: condition.__setitem__(0, met)


@pytest.fixture
def nothing(tmp_path: Path) -> Path:
    """A registry without adapters."""
    (tmp_path / "registry").mkdir()
    return tmp_path / "registry"


@pytest.mark.parametrize("lasts", range(6))
def test_a_bucket_that_can_not_grow_is_as_before(fits: Any, lasts: int) -> None:
    cache = KvCache(SHAPE, ROOMY)
    rows = {f"r{i}": torch.full((20, 18), float(i)) for i in range(4)}
    for name, values in rows.items():
        cache.reserve(name, 20)
        cache.write(name, 0, values)
    count = itertools.count()
    fits(lambda _: next(count) < lasts)  # in the middle of its blocks
    with pytest.raises(torch.OutOfMemoryError):
        cache.reserve("new", 20)
    assert "new" not in cache
    assert {len(block) for block in cache.buckets[NARROWEST].list_blocks()} == {4}
    fits(lambda _: True)
    cache.reserve("new", 20)
    cache.write("new", 0, torch.full((20, 18), 9.0))
    for name, values in rows.items():
        assert torch.equal(cache.read(name, 0, 20), values)


def test_places_that_no_row_needs_make_room(fits: Any) -> None:
    cache = KvCache(SHAPE, ROOMY)
    cache.reserve("long", 2 * NARROWEST)
    fits(lambda block: len(block) * block.shape[2] + sum(
        bucket.num_places * width for width, bucket in cache.buckets.items() if width != block.shape[2]
    ) <= 4 * NARROWEST)  # fmt: skip
    cache.reserve("short", 20)
    assert {width: bucket.num_places for width, bucket in cache.buckets.items()} == {NARROWEST: 1, 2 * NARROWEST: 1}


def test_a_row_without_memory_waits_for_others(tiny_llama: Path, nothing: Path, fits: Any) -> None:
    engine = engine_on(tiny_llama, nothing)
    prompts = [[5 + i, 6, 7] for i in range(7)]

    async def work() -> list[Any]:
        fits(lambda block: len(block) <= 4)
        return await asyncio.gather(*(completed(engine, prompt, id=str(prompt)) for prompt in prompts))

    found = serving(engine, work)
    assert engine.get_stats().preemptions > 0
    for prompt, (_, tokens, _) in zip(prompts, found, strict=True):
        assert tokens == with_peft(tiny_llama, None, prompt, 12)


def test_a_row_that_outgrows_the_memory_is_refused_and_the_engine_goes_on(
    tiny_llama: Path, nothing: Path, fits: Any
) -> None:
    engine = engine_on(tiny_llama, nothing)
    prompt = [5 + i % 90 for i in range(NARROWEST - 5)]

    async def work() -> None:
        fits(lambda block: block.shape[2] == NARROWEST)
        long = [completed(engine, prompt, id=f"{i}", max_tokens=20) for i in range(3)]
        short = completed(engine, [5, 6], id="short")
        *refused, (_, tokens, _) = await asyncio.gather(*long, short, return_exceptions=True)  # type: ignore[misc]
        assert all(isinstance(error, OverloadedError) for error in refused)
        assert "no memory for a request of 257 tokens" in str(refused[0])
        assert tokens == with_peft(tiny_llama, None, [5, 6], 12)
        fits(lambda _: False)  # not even a first row
        engine._core._cache.buckets.clear()
        both = [completed(engine, [5, 6, i], id=f"none{i}") for i in range(2)]
        assert {type(error) for error in await asyncio.gather(*both, return_exceptions=True)} == {OverloadedError}
        fits(lambda _: True)
        assert (await completed(engine, prompt, max_tokens=20))[1] == with_peft(tiny_llama, None, prompt, 20)
        assert engine.alive

    serving(engine, work)


def test_prefixes_are_forgotten_before_rows_wait(
    tiny_llama: Path, nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(tiny_llama, nothing)

    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    async def work() -> None:
        prompt = [5 + i for i in range(40)]
        await completed(engine, prompt)
        assert engine._core._prefixes.num_tokens
        monkeypatch.setattr(KvCache, "read", full)
        assert (await completed(engine, prompt[::-1]))[1] == with_peft(tiny_llama, None, prompt[::-1], 12)
        assert engine._core._prefixes.num_tokens == 0

    serving(engine, work)


def test_a_step_that_is_too_large_is_computed_in_parts(
    tiny_llama: Path, nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(tiny_llama, nothing)
    compute, most = ModelRunner.compute_step, [2]

    def limited(self: ModelRunner, cache: KvCache, works: Any, **kwargs: Any) -> StepOutputs:
        if sum(len(work.tokens) for work in works) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, cache, works, **kwargs)

    prompts = [[5 + i, *range(40, 50)] for i in range(5)]

    async def work() -> None:
        monkeypatch.setattr(ModelRunner, "compute_step", limited)
        found = await asyncio.gather(*(completed(engine, prompt, id=str(prompt)) for prompt in prompts))
        for prompt, (_, tokens, _) in zip(prompts, found, strict=True):
            assert tokens == with_peft(tiny_llama, None, prompt, 12)
        most[0] = 0
        with pytest.raises(OverloadedError, match="no memory"):
            await completed(engine, [5, 6])
        assert engine.alive

    serving(engine, work)


@pytest.fixture
def engine_and_adapter(tiny_llama: Path, nothing: Path, tmp_path: Path) -> tuple[ServingEngine, str]:
    write_adapter(tiny_llama, tmp_path / "lora", "lora")
    ref = publish(nothing, tiny_llama, "lora", tmp_path / "lora")
    return engine_on(tiny_llama, nothing), ref


def raising(error: Exception) -> Callable[..., Any]:
    """A function that fails with the error."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_an_adapter_that_there_is_no_memory_for_can_be_asked_for_again(
    engine_and_adapter: tuple[ServingEngine, str], tiny_llama: Path, nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ref = engine_and_adapter
    full = raising(torch.OutOfMemoryError("CUDA out of memory"))

    async def work() -> None:
        with monkeypatch.context() as patched:
            patched.setattr("rankloom.engine.adapter_cache.loading.fold", full)
            with pytest.raises(OverloadedError, match="no memory to load lora@1 now"):
                await completed(engine, [5, 6], ref)
        assert (await completed(engine, [5, 6], ref))[1] == with_peft(tiny_llama, nothing / "lora" / "1", [5, 6], 12)

    serving(engine, work)


@pytest.mark.parametrize("lasts", [0, 1, 9])
def test_an_adapter_that_finds_no_room_in_the_table_is_served_without_a_slot(
    tiny_llama: Path, nothing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasts: int
) -> None:
    refs = []
    for seed, name in enumerate(("one", "two")):
        write_adapter(tiny_llama, tmp_path / name, "lora", seed=seed)
        refs.append(publish(nothing, tiny_llama, name, tmp_path / name))
    with kernels.everywhere():
        engine = engine_on(tiny_llama, nothing)
    count, grown = itertools.count(), slot_table._enlarge

    def short(*args: Any) -> torch.Tensor:
        if next(count) >= lasts:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return grown(*args)

    async def work() -> None:
        await asyncio.gather(*map(engine.pin, refs))
        monkeypatch.setattr(slot_table, "_enlarge", short)
        found = await asyncio.gather(*(completed(engine, [5, 6], ref, id=ref) for ref in refs))
        assert next(count) > lasts
        for name, (_, tokens, _) in zip(("one", "two"), found, strict=True):
            assert tokens == with_peft(tiny_llama, nothing / name / "1", [5, 6], 12)

    serving(engine, work)


@pytest.mark.parametrize(
    ("error", "context_is_lost", "ends"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), True, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"), False, False),
    ],
)
def test_a_lost_device_ends_the_engine(
    tiny_llama: Path,
    nothing: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    context_is_lost: bool,
    ends: bool,
) -> None:
    engine = engine_on(tiny_llama, nothing)

    def synchronize(*_: Any) -> None:
        if context_is_lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    async def work() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_initialized", lambda: True)
            patched.setattr(torch.cuda, "synchronize", synchronize)
            patched.setattr(ModelRunner, "compute_step", raising(error))
            patched.setattr(threading, "excepthook", lambda _: None)
            with pytest.raises(OverloadedError if ends else ModelError):
                await completed(engine, [5, 6])
            await asyncio.to_thread(engine._thread.join, 5 if ends else 0)
        assert engine.alive is not ends
        if not ends:
            assert (await completed(engine, [5, 6]))[1] == with_peft(tiny_llama, None, [5, 6], 12)

    serving(engine, work)


def test_a_device_that_is_lost_while_an_adapter_is_loaded_ends_the_engine(
    engine_and_adapter: tuple[ServingEngine, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ref = engine_and_adapter
    lost = raising(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))

    async def work() -> None:
        monkeypatch.setattr("rankloom.engine.adapter_cache.loading.fold", lost)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        waiting = [completed(engine, [5, 6], ref), engine.pin(ref)]
        for refused in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(refused, OverloadedError)
        await asyncio.to_thread(engine._thread.join, 5)
        assert not engine.alive

    serving(engine, work)
