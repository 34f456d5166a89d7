"""What an endpoint measures, and for how many adapters."""

from __future__ import annotations

import pytest

from rankloom.gateway import metrics as module
from rankloom.gateway.metrics import Metrics


def test_series_are_kept_of_the_adapters_asked_for_last_and_totals_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ADAPTERS", 2)
    metrics = Metrics()
    tokens = {"prompt": 5, "cached": 0, "completion": 3}
    for adapter, traffic in (("a@1", "live"), ("b@1", "live"), ("a@1", "shadow"), ("c@1", "live"), ("c@1", "live")):
        metrics.count_request(adapter, traffic, "ok", tokens=tokens, first_s=0.1, token_s=0.01)
    text = metrics.expose().decode()
    assert 'adapter="b@1"' not in text
    assert 'rankloom_requests_total{adapter="a@1",outcome="ok",traffic="live"} 1.0' in text
    assert 'rankloom_requests_total{adapter="a@1",outcome="ok",traffic="shadow"} 1.0' in text
    assert 'rankloom_tokens_total{adapter="c@1",kind="completion",traffic="live"} 6.0' in text
    assert 'rankloom_token_seconds_count{adapter="c@1",traffic="live"} 2.0' in text
    assert metrics.sum_totals() == {"requests": 4, "completion_tokens": 12, "in_flight": 0}
    metrics.count_request("b@1", "live", "cancelled", tokens=tokens, first_s=None, token_s=None)
    text = metrics.expose().decode()
    assert 'rankloom_requests_total{adapter="b@1",outcome="cancelled",traffic="live"} 1.0' in text
    assert 'first_token_seconds_count{adapter="b@1"' not in text
    assert 'adapter="a@1"' not in text
