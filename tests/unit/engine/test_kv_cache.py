"""The cache's rows stay what they are while others come, grow and go; prefixes are found, split, and never mixed."""

from __future__ import annotations

import random

import pytest
import torch

from rankloom.engine.kv_cache import (
    CPU_PREFIX_TOKENS,
    CPU_TOKENS,
    MOST_PREFIX_TOKENS,
    NARROWEST,
    KvCache,
    KvShape,
    choose_bucket_width,
    choose_capacity,
    choose_prefix_capacity,
)
from rankloom.engine.kv_pool import KvPool
from rankloom.engine.prefix import PrefixTree
from rankloom.errors import ConfigError
from rankloom.models.device import free_cuda_bytes

SHAPE = KvShape.repeat(num_layers=2, num_heads=1, width=3, dtype=torch.float32, device=torch.device("cpu"))


def values(length: int, seed: int) -> torch.Tensor:
    return torch.randn(length, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [KvCache, KvPool])
def test_rows_keep_their_values_whoever_comes_and_goes(kind: type[KvCache] | type[KvPool]) -> None:
    cache, chance = kind(SHAPE, 40 * NARROWEST), random.Random(0)
    rows: dict[str, torch.Tensor] = {}
    for number in range(200):
        action = chance.choice(["new", "grow", "remove"])
        if action == "new" and len(rows) < 6:
            name, length = f"r{number}", chance.randint(1, 700)
            cache.reserve(name, length)
            cache.write(name, 0, values(length, number))
            rows[name] = values(length, number)
        elif action == "grow" and rows:
            name = chance.choice(list(rows))
            more = values(chance.randint(1, 300), number)
            start = rows[name].shape[0]
            if start + more.shape[0] > 2048:
                continue
            cache.reserve(name, start + more.shape[0])
            cache.write(name, start, more)
            rows[name] = torch.cat([rows[name], more], dim=0)
        elif action == "remove" and rows:
            name = chance.choice(list(rows))
            cache.remove(name)
            del rows[name]
            assert name not in cache
        for name, expected in rows.items():
            assert torch.equal(cache.read(name, 0, expected.shape[0]), expected)
        assert cache.held == sum(cache.compute_room(v.shape[0]) for v in rows.values()) <= cache.capacity


def test_allocation_stays_within_the_capacity() -> None:
    cache = KvCache(SHAPE, 8 * NARROWEST)
    for i in range(8):
        cache.reserve(f"short{i}", 10)
    for i in range(8):
        cache.remove(f"short{i}")
    cache.reserve("long", 8 * NARROWEST)
    assert sum(s.num_places * w for w, s in cache.buckets.items()) <= cache.capacity
    cache.remove("long")
    for i in range(8):
        cache.reserve(f"again{i}", 10)
    assert sum(s.num_places * w for w, s in cache.buckets.items()) <= cache.capacity


def test_a_pool_gives_every_page_once_and_refuses_more() -> None:
    pool = KvPool(SHAPE, 5 * NARROWEST + 7)
    assert (pool.capacity, pool.longest, pool.compute_room(257)) == (5 * NARROWEST, 5 * NARROWEST, 2 * NARROWEST)
    before = pool.blocks_2LSTHE.data_ptr()
    pool.reserve("a", 2 * NARROWEST + 1)
    pool.reserve("b", 2 * NARROWEST)
    assert sorted(pool.get_pages("a") + pool.get_pages("b")) == [
        1,
        2,
        3,
        4,
        5,
    ]  # the first is for rows without a sequence
    with pytest.raises(torch.OutOfMemoryError, match="0 free pages, but 1 are needed"):
        pool.reserve("b", 2 * NARROWEST + 1)
    assert len(pool.get_pages("b")) == 2
    with pytest.raises(torch.OutOfMemoryError):
        pool.reserve("c", 1)
    assert "c" not in pool
    pool.remove("a")
    pool.reserve("c", 3 * NARROWEST)
    assert pool.blocks_2LSTHE.data_ptr() == before


def test_a_pool_that_does_not_fit_is_a_setting_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr("rankloom.engine.kv_pool.free_cuda_bytes", lambda _: 3 << 30)
    with pytest.raises(ConfigError, match=r"engine.kv_cache_tokens=67108864: takes 3.0 GiB of cpu, of which 3.0 GiB"):
        KvPool(SHAPE, 1 << 26)


@pytest.mark.parametrize(("length", "width"), [(1, 256), (256, 256), (257, 512), (513, 1024)])
def test_shelf_width(length: int, width: int) -> None:
    assert choose_bucket_width(length) == width


def kept(tree: PrefixTree, key: str | None, tokens: list[int]) -> torch.Tensor:
    """Inserts tokens whose values are the tokens themselves."""
    whole = torch.tensor(tokens, dtype=torch.float32)[:, None].expand(-1, 12)
    tree.insert(key, tokens, lambda start, stop: whole[start:stop].clone())
    return whole


def found(tree: PrefixTree, key: str | None, tokens: list[int]) -> list[int]:
    known = tree.match(key, tokens)
    assert known.length == sum(piece.shape[0] for piece in known.pieces)
    return [int(v) for piece in known.pieces for v in piece[:, 0]]


def test_the_longest_common_beginning_is_found() -> None:
    tree = PrefixTree(1000)
    system, first, second = list(range(100, 140)), list(range(20)), list(range(50, 80))
    kept(tree, "a@1", system + first)
    assert found(tree, "a@1", system + first) == system + first
    assert found(tree, "a@1", system + [7] * 30) == system
    kept(tree, "a@1", system + second)
    assert tree.num_tokens == len(system + first + second)  # the common part is there once
    assert found(tree, "a@1", system + second + [5]) == system + second
    assert found(tree, "a@1", system + first) == system + first


def test_another_version_never_finds_it() -> None:
    tree, tokens = PrefixTree(1000), list(range(60))
    kept(tree, "a@1", tokens)
    assert found(tree, "a@2", tokens) == found(tree, None, tokens) == []


def test_the_least_recently_used_goes_and_what_is_shared_stays_longest() -> None:
    tree = PrefixTree(120)
    system = list(range(100, 140))
    for i in range(5):
        kept(tree, None, system + [i] * 30)
        assert tree.num_tokens <= 120
    assert found(tree, None, system + [4] * 30) == system + [4] * 30
    assert found(tree, None, system + [0] * 30) == system


def with_states(tree: PrefixTree, tokens: list[int]) -> None:
    """Inserts tokens, and their number as the states after them."""
    whole = torch.tensor(tokens, dtype=torch.float32)[:, None].expand(-1, 12)
    tree.insert(None, tokens, lambda start, stop: whole[start:stop].clone(), (torch.tensor([[len(tokens)]]),))


def test_layers_with_states_continue_where_these_are_known() -> None:
    tree, system = PrefixTree(1000, tokens_per_states=50), list(range(100, 140))
    with_states(tree, system + [1] * 20)
    known = tree.match(None, system + [2] * 20)  # nothing is known of the states where the two part
    assert (known.length, known.pieces, known.states, known.num_agreeing) == (0, (), (), 40)
    with_states(tree, system)
    with_states(tree, system + [2] * 20)
    assert tree.num_tokens == 40 + 20 + 20 + 3 * 50
    for tokens, length in ((system + [3] * 20, 40), (system + [1] * 30, 60), (system[:30], 0)):
        known = tree.match(None, tokens)
        assert (known.length, [int(state) for state in known.states]) == (length, [length] if length else [])
        assert sum(len(piece) for piece in known.pieces) == length
    with_states(tree, system + [2] * 25)  # so few tokens further, others are cheaper to compute
    assert tree.num_tokens == 40 + 20 + 20 + 3 * 50


def test_what_can_not_be_continued_is_dropped_with_what_followed_it() -> None:
    tree, system = PrefixTree(200, tokens_per_states=50), list(range(100, 140))
    with_states(tree, system + [1] * 20)
    with_states(tree, system + [2] * 20)
    assert tree.num_tokens == 40 + 2 * (20 + 50)
    with_states(tree, list(range(300, 400)))
    assert tree.num_tokens == 150
    assert not tree.match(None, system + [1] * 20).length


def test_what_is_short_or_too_long_is_not_kept() -> None:
    tree = PrefixTree(100)
    kept(tree, None, list(range(8)))
    kept(tree, None, list(range(200)))
    assert tree.num_tokens == 0


@pytest.mark.parametrize(
    ("part", "longest", "tokens"),
    [
        (1.0, 1 << 17, 300_000),  # half of what is free beside 20 GB of this and 10 of other processes
        (0.5, 1 << 17, 100_000),  # 40 GB are its own, of which it has 20
        (1.0, 4096, 8 * 4096),  # more than the rows can fill
        (0.25, 4096, NARROWEST),
    ],
)
def test_the_cache_is_as_large_as_the_memory_beside_the_base(
    part: float, longest: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (50e9, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 30e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 20e9)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", {None: part}.__getitem__)  # takes no "cuda"
    shape = KvShape.repeat(25, 10, 100, torch.bfloat16, torch.device("cuda"))
    assert shape.bytes_per_token == 100_000
    free = free_cuda_bytes(shape.device)
    assert choose_capacity(shape, free, 8, longest) == tokens
    assert choose_capacity(SHAPE, None, 8, longest) == CPU_TOKENS
    assert choose_prefix_capacity(shape, free) == min(MOST_PREFIX_TOKENS, int(free / 10) // 100_000)
    assert choose_prefix_capacity(SHAPE, None) == CPU_PREFIX_TOKENS
