"""Which cluster, and how it is divided among workers; nothing here starts Ray."""

from __future__ import annotations

from typing import Any

import pytest

from rankloom.config.trial import ComputeConfig
from rankloom.errors import ConfigError, RankloomError
from rankloom.launch.cluster import Share, connected, share


@pytest.mark.parametrize(
    ("compute", "nodes", "expected"),
    [
        ({"num_workers": 1}, [{"CPU": 2}], Share(1, 2, False)),
        ({"num_workers": 2}, [{"CPU": 7}], Share(2, 3, False)),
        ({"num_workers": 3}, [{"CPU": 8}, {"CPU": 4}], Share(3, 4, False)),
        ({"num_workers": 2}, [{"CPU": 4}, {"CPU": 1}], Share(2, 2, False)),
        ({"num_workers": 2, "cpus_per_worker": 1}, [{"CPU": 8}], Share(2, 1, False)),
        ({"num_workers": 2}, [{"CPU": 8, "GPU": 2}], Share(2, 1, True)),
        ({"num_workers": 1, "device": "cpu"}, [{"CPU": 8, "GPU": 2}], Share(1, 8, False)),
    ],
)
def test_workers_get_an_even_share(compute: dict[str, Any], nodes: list[dict[str, float]], expected: Share) -> None:
    assert share(ComputeConfig(**compute), nodes, growing=False) == expected


@pytest.mark.parametrize(
    ("compute", "nodes", "message"),
    [
        ({"num_workers": 3}, [{"CPU": 2}], "room for 2"),
        ({"num_workers": 2, "cpus_per_worker": 2}, [{"CPU": 3}], "room for 1"),
        ({"num_workers": 2}, [{"CPU": 8, "GPU": 1}], "room for 1"),
        ({"num_workers": 1, "device": "cuda"}, [{"CPU": 8}], "no GPU"),
    ],
)
def test_what_does_not_fit_is_refused_unless_the_cluster_grows(
    compute: dict[str, Any], nodes: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        share(ComputeConfig(**compute), nodes, growing=False)
    assert share(ComputeConfig(**compute), nodes, growing=True).num_workers == compute["num_workers"]


def test_a_cluster_that_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with (
        pytest.raises(RankloomError, match=r"nothing answers at RAY_ADDRESS=127\.0\.0\.1:9"),
        connected(ComputeConfig()),
    ):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigError, match="rankloom submit"), connected(ComputeConfig()):
        pass
