"""What is recorded, when, and what happens where it can't be; on fake graphs, which need no GPU."""

from __future__ import annotations

import pytest
import torch

from fake_graph import fake_graphs
from rankloom.kernels.graphs import GraphCache


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> GraphCache:
    fake_graphs(monkeypatch)
    return GraphCache(torch.device("cuda"), most=2)


def test_a_function_is_computed_recorded_and_replayed(graphs: GraphCache) -> None:
    buffer, calls = torch.zeros(3), []

    def double() -> torch.Tensor:
        calls.append(1)
        return (buffer + 1) * 2

    found = []
    for value in range(5):
        buffer.fill_(value)
        found.append(graphs.run("double", double)[0].item())
    assert found == [2, 4, 6, 8, 10]
    assert len(calls) == 2
    assert graphs.num_recorded == 1


def test_no_more_are_kept_than_asked_for(graphs: GraphCache) -> None:
    one = torch.ones(1)
    for _ in range(3):
        for key in range(3):
            assert graphs.run(key, lambda key=key: one * key).item() == key  # type: ignore[misc]
    assert graphs.num_recorded == 2


@pytest.mark.parametrize("step", ["item", "host", "boolean"])
def test_what_can_not_be_recorded_is_computed(graphs: GraphCache, step: str, caplog: pytest.LogCaptureFixture) -> None:
    buffer = torch.ones(3)

    def work() -> torch.Tensor:
        if step == "item":
            return buffer * buffer[0].item()
        return buffer + torch.tensor([1.0, 2.0, 3.0]) if step == "host" else buffer[buffer > 0]

    for _ in range(3):
        assert graphs.run("work", work).shape == (3,)
    assert graphs.num_recorded == 0
    assert caplog.text.count("CUDA graphs are off") == 1
    assert "not permitted when stream is capturing" in caplog.text


def test_a_cpu_records_nothing() -> None:
    graphs = GraphCache(torch.device("cpu"))
    assert [graphs.run("key", lambda: 1) for _ in range(3)] == [1, 1, 1]
    assert graphs.num_recorded == 0
