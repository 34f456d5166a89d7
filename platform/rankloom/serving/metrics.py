"""What an endpoint measures, for Prometheus; every counter by adapter."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from rankloom.serving.protocol import Stats

Outcome = Literal["ok", "client error", "server error", "cancelled"]
Traffic = Literal["live", "shadow"]

_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_GAUGES = {"running", "waiting", "cache_tokens", "cache_capacity", "resident"}


class Metrics:
    """One endpoint's measures, in a collection of their own."""

    def __init__(self) -> None:
        self._all = CollectorRegistry()
        by = ["adapter", "traffic"]

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"rankloom_{name}", text, labels, registry=self._all)

        self.requests = counter("requests", "Requests that ended.", [*by, "outcome"])
        self.tokens = counter("tokens", "Tokens, of prompts, of these from the cache, and generated.", [*by, "kind"])
        self.first_token_s = Histogram(
            "rankloom_first_token_seconds", "Time to the first token.", by, buckets=_FIRST_S, registry=self._all
        )
        self.token_s = Histogram(
            "rankloom_token_seconds", "Time between tokens, a request's mean.", by, buckets=_TOKEN_S, registry=self._all
        )
        self.in_flight = Gauge("rankloom_in_flight", "Requests under way.", registry=self._all)
        self.refused = counter("refused", "Requests that were not begun.", ["status"])
        self.retries = counter("retries", "Requests begun again after a replica was lost.", [])
        self._replicas = _Replicas()
        self._all.register(self._replicas)

    def replica(self, name: str, stats: Stats, resident: int) -> None:
        """Take in what a replica said of itself."""
        self._replicas.latest[name] = (time.monotonic(), asdict(stats) | {"resident": resident})

    def forget_replicas(self, before: float) -> None:
        """Drop those that have said nothing since."""
        self._replicas.latest = {name: (at, each) for name, (at, each) in self._replicas.latest.items() if at >= before}

    def totals(self) -> dict[str, float]:
        """Of live traffic, over all adapters: requests that ended, tokens generated, requests under way."""

        def total(counter: Counter, **wanted: str) -> float:
            samples = (sample for metric in counter.collect() for sample in metric.samples)
            return sum(s.value for s in samples if s.name.endswith("_total") and wanted.items() <= s.labels.items())

        return {
            "requests": total(self.requests, traffic="live"),
            "completion_tokens": total(self.tokens, traffic="live", kind="completion"),
            "in_flight": next(iter(self.in_flight.collect())).samples[0].value,
        }

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._all)


class _Replicas:
    """The replicas' own figures, as they came last."""

    def __init__(self) -> None:
        self.latest: dict[str, tuple[float, dict[str, int]]] = {}

    def collect(self) -> Iterable[Metric]:
        keys = [*Stats.__dataclass_fields__, "resident"]
        for key in keys:
            family = GaugeMetricFamily if key in _GAUGES else CounterMetricFamily
            metric = family(f"rankloom_replica_{key}", f"The replica's {key.replace('_', ' ')}.", labels=["replica"])
            for replica, (_, values) in self.latest.items():
                metric.add_metric([replica], values[key])
            yield metric
