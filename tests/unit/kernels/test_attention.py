"""Attention over pages, in triton's interpreter and by its reference, against attention to each sequence alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rankloom import kernels
from rankloom.kernels import attention
from rankloom.kernels.triton import attention as attention_triton

PAGE, PAGES = 64, 9
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}


@pytest.fixture(params=[torch.float32, torch.float16], ids=["fp32", "fp16"])  # its products of bf16 are wrong
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype


def alone(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a sequence's last tokens [t, H, E] to all of it [L, h, E], in fp32, score by score."""
    q, k, v = (x.float().transpose(0, 1) for x in (query, keys, values))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    t, length = q.shape[1], k.shape[1]
    score = q @ k.mT * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    seen = torch.ones(t, length, dtype=torch.bool).tril(length - t)
    if window:
        seen &= seen.triu(length - t - window + 1)
    score = score.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        score = torch.cat([score, sinks.float()[:, None, None].expand(-1, t, 1)], -1)
    return (score.softmax(-1)[..., :length] @ v).transpose(0, 1)


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("decode", [attention.decode_attention, attention_triton.decode_attention])
@pytest.mark.parametrize(
    ("group", "width", "window", "softcap", "sunk"),
    [(3, 16, 0, 0.0, False), (1, 20, 0, 0.0, False), (3, 16, 70, 0.5, True), (1, 20, 1, 0.0, False)],
)
def test_decoding_writes_a_token_and_attends_to_all(
    decode: Callable[..., torch.Tensor],
    group: int,
    width: int,
    window: int,
    softcap: float,
    sunk: bool,
    dtype: torch.dtype,
) -> None:
    lengths, tables, heads = [1, 65, 64, 190], [[5, 0, 0], [1, 2, 0], [7, 0, 0], [8, 3, 4]], 2
    keys, values = (drawn(PAGES, PAGE, heads, width, dtype=dtype, seed=seed) for seed in (0, 1))
    keys[6], values[6] = torch.nan, torch.nan  # nobody's
    # queries as models give them: heads before tokens
    query = drawn(group * heads, 4, width, dtype=dtype, seed=2).transpose(0, 1)
    key, value = (drawn(heads, 4, width, dtype=dtype, seed=seed).transpose(0, 1) for seed in (3, 4))
    table, length = torch.tensor(tables), torch.tensor(lengths)
    untouched, sinks = keys.clone(), drawn(group * heads, dtype=dtype, seed=5) if sunk else None
    found = decode(query, key, value, keys, values, table, length, 0.3, window, softcap, sinks)
    assert (found.shape, found.dtype) == (query.shape, dtype)
    for row, (pages, n) in enumerate(zip(tables, lengths, strict=True)):
        own_keys, own_values = (x[pages].flatten(0, 1)[:n] for x in (keys, values))
        assert torch.equal(own_keys[-1], key[row])
        assert torch.equal(own_values[-1], value[row])
        expected = alone(query[row : row + 1], own_keys, own_values, 0.3, window, softcap, sinks)[0]
        torch.testing.assert_close(found[row].float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    changed = (keys != untouched).flatten(1).any(1)
    changed[6] = False
    assert changed.nonzero().flatten().tolist() == [2, 4, 5, 7]


@pytest.mark.parametrize("rows", [1, 700])
def test_few_sequences_are_split_and_many_are_not(rows: int) -> None:
    assert attention_triton._num_splits(rows) == (16 if rows == 1 else 1)
    pages = drawn(2, PAGE, 1, 16, dtype=torch.float32, seed=0)
    args = [drawn(rows, 1, 16, dtype=torch.float32, seed=seed) for seed in range(3)]
    table, length = torch.ones(rows, 1, dtype=torch.long), torch.full((rows,), 40)
    expected = attention.decode_attention(*args, pages.clone(), pages.clone(), table, length, 1.0)
    if rows == 1:  # the interpreter takes a second for a hundred programs
        found = attention_triton.decode_attention(*args, pages, pages.clone(), table, length, 1.0)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk", [attention.chunk_attention, attention_triton.chunk_attention])
@pytest.mark.parametrize(
    ("window", "softcap", "sunk"), [(0, 0.0, False), (5, 0.0, False), (0, 0.5, False), (20, 0.5, True)]
)
def test_chunks_attend_to_themselves_and_what_came_before(
    chunk: Callable[..., torch.Tensor], window: int, softcap: float, sunk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MOST_SCORES", 3 * 4 * 128 * 7)  # so that they are computed in parts
    lengths, counts, tables = [70, 30, 65], [10, 30, 1], [[1, 2], [3, 0], [4, 5]]
    keys, values = (drawn(PAGES, PAGE, 2, 16, dtype=torch.float32, seed=seed) for seed in (0, 1))
    query = drawn(44, 4, 16, dtype=torch.float32, seed=2)  # three tokens more than the sequences have
    starts = torch.tensor([0, 10, 40, 41], dtype=torch.int32)
    sinks = drawn(4, dtype=torch.float32, seed=3) if sunk else None
    table, length = torch.tensor(tables), torch.tensor(lengths)
    found = chunk(query, keys, values, table, length, starts, 30, 0.3, window, softcap, sinks)
    assert found.shape == query.shape
    assert found.isfinite().all()
    for row, (pages, n, count) in enumerate(zip(tables, lengths, counts, strict=True)):
        own = slice(int(starts[row]), int(starts[row]) + count)
        own_keys, own_values = (x[pages].flatten(0, 1)[:n] for x in (keys, values))
        expected = alone(query[own], own_keys, own_values, 0.3, window, softcap, sinks)
        torch.testing.assert_close(found[own], expected)


def test_chunks_in_bf16_are_torchs_own_attention() -> None:
    """By shapes alone: it has values on CUDA only."""
    with FakeTensorMode():
        query, pages = torch.empty(44, 4, 64).bfloat16(), torch.empty(PAGES, PAGE, 2, 64).bfloat16()
        table, length = torch.ones(3, 2, dtype=torch.long), torch.ones(3, dtype=torch.long)
        starts = torch.ones(4, dtype=torch.int32)
        with Names() as names:
            found = attention_triton.chunk_attention(query, pages, pages, table, length, starts, 30, 0.3, 5)
            sunk = attention_triton.chunk_attention(
                query, pages, pages, table, length, starts, 30, 0.3, 5, 0.0, torch.empty(4)
            )
    assert (sunk.shape, sunk.dtype) == (query.shape, torch.bfloat16)
    assert (found.shape, found.dtype) == (query.shape, torch.bfloat16)
    assert names.found["_flash_attention_forward"] == 2
    assert names.found["index"] == 4  # keys and values


class Names(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.__name__.split(".")[0]] += 1
        return func(*args, **kwargs or {})


def test_decoding_launches_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    call, launched = GridExecutor.__call__, []
    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: (launched.append(1), call(*args, **kwargs)))
    launch_attention(num_rows=1, group=1, width=16, dtype=torch.float32)
    assert len(launched) == kernels.LAUNCHES["decode_attention"]


def launch_attention(num_rows: int = 16, group: int = 4, width: int = 128, dtype: torch.dtype = torch.bfloat16) -> None:
    """For test_compile.py: rows of an 8B."""
    query, key = torch.zeros(num_rows, 2 * group, width).to(dtype), torch.zeros(num_rows, 2, width).to(dtype)
    pages, table = torch.zeros(2, 256, 2, width).to(dtype), torch.zeros(num_rows, 3, dtype=torch.long)
    length = torch.ones(num_rows, dtype=torch.long)
    attention_triton.decode_attention(query, key, key, pages, pages.clone(), table, length, 0.1)


def launch_attention_of_a_small_base() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        launch_attention(64, 3, 64, dtype)
