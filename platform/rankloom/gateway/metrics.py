"""An endpoint's metrics for Prometheus: in total, and for each recently used adapter."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from rankloom.engine.protocol import Stats

Outcome = Literal["ok", "client error", "server error", "cancelled"]
Traffic = Literal["live", "shadow", "pace"]

_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
MAX_ADAPTERS = 250
"""Adapters with series of their own, the most recently used ones. An adapter that returns starts at zero, as after a
restart. With all their series, a scrape of 1,000 adapters held up other requests for half a second."""
_GAUGES = {"running", "waiting", "cache_tokens", "cache_capacity", "resident"}


class Metrics:
    """One endpoint's metrics, in a collector registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # a third of all lines, which Prometheus does not read
        self._all = CollectorRegistry()
        by = ["adapter", "traffic"]

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"rankloom_{name}", text, labels, registry=self._all)

        self._requests = counter("requests", "Requests that ended.", [*by, "outcome"])
        self._tokens = counter("tokens", "Tokens, of prompts, of these from the cache, and generated.", [*by, "kind"])
        self._first_token_s = Histogram(
            "rankloom_first_token_seconds", "Time to the first token.", by, buckets=_FIRST_S, registry=self._all
        )
        self._token_s = Histogram(
            "rankloom_token_seconds", "Time between tokens, a request's mean.", by, buckets=_TOKEN_S, registry=self._all
        )
        self.in_flight = Gauge("rankloom_in_flight", "Requests in flight.", registry=self._all)
        self.refused = counter("refused", "Requests that were refused.", ["status"])
        self.retries = counter("retries", "Requests begun again after a replica was lost.", [])
        self._replicas = _Replicas()
        self._all.register(self._replicas)
        self._adapters: OrderedDict[str, None] = OrderedDict()
        """The most recently used last."""
        self._live = {"requests": 0, "completion_tokens": 0}

    def count_request(
        self,
        adapter: str,
        traffic: Traffic,
        outcome: Outcome,
        *,
        tokens: Mapping[str, int],
        first_s: float | None,
        token_s: float | None,
    ) -> None:
        """Count a request that has ended.

        Args:
            tokens: by their kind.
            first_s: to its first token; None: it had none.
            token_s: between two of its tokens.
        """
        self._adapters[adapter] = None
        self._adapters.move_to_end(adapter)
        if len(self._adapters) > MAX_ADAPTERS:
            oldest, _ = self._adapters.popitem(last=False)
            for metric in (self._requests, self._tokens, self._first_token_s, self._token_s):
                metric.remove_by_labels({"adapter": oldest})
        self._requests.labels(adapter, traffic, outcome).inc()
        for kind, count in tokens.items():
            self._tokens.labels(adapter, traffic, kind).inc(count)
        if first_s is not None:
            self._first_token_s.labels(adapter, traffic).observe(first_s)
        if token_s is not None:
            self._token_s.labels(adapter, traffic).observe(token_s)
        if traffic == "live":
            self._live["requests"] += 1
            self._live["completion_tokens"] += tokens["completion"]

    def record_replica(self, name: str, stats: Stats, resident: int) -> None:
        """Record a replica's own figures."""
        self._replicas.latest[name] = (time.monotonic(), asdict(stats) | {"resident": resident})

    def forget_replicas(self, before: float) -> None:
        """Drop replicas that have reported nothing since `before`, a time of `time.monotonic`."""
        self._replicas.latest = {name: (at, each) for name, (at, each) in self._replicas.latest.items() if at >= before}

    def sum_totals(self) -> dict[str, float]:
        """Sum live traffic over all adapters: requests that ended, tokens generated, requests in flight."""
        return {**self._live, "in_flight": next(iter(self.in_flight.collect())).samples[0].value}

    def expose(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self._all)


class _Replicas:
    """The latest figures that the replicas reported."""

    def __init__(self) -> None:
        self.latest: dict[str, tuple[float, dict[str, int]]] = {}

    def collect(self) -> Iterable[Metric]:
        keys, latest = [*Stats.__dataclass_fields__, "resident"], dict(self.latest)  # read in a thread of its own
        for key in keys:
            family = GaugeMetricFamily if key in _GAUGES else CounterMetricFamily
            metric = family(f"rankloom_replica_{key}", f"The replica's {key.replace('_', ' ')}.", labels=["replica"])
            for replica, (_, values) in latest.items():
                metric.add_metric([replica], values[key])
            yield metric
